"""`utils.types`."""

from miles_compat.upstream import Sample

__all__ = ["Sample"]
