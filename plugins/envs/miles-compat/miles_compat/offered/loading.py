"""`utils.misc`."""

from __future__ import annotations

from typing import Any, ClassVar

from miles_compat.calling import load_function

__all__ = ["SingletonMeta", "load_function"]


class SingletonMeta(type):
    """The metaclass of classes that have one instance in a process."""

    _instances: ClassVar[dict[type, Any]] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in cls._instances:
            cls._instances[cls] = super().__call__(*args, **kwargs)
        return cls._instances[cls]

    @staticmethod
    def clear_instances(cls: type) -> None:
        """Forget the instance of a class, or of all."""
        SingletonMeta._instances.clear()
