"""`utils.async_utils`."""

from miles_compat.calling import run

__all__ = ["run"]
