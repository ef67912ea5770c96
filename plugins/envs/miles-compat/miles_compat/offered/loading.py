"""`utils.misc`."""

from __future__ import annotations

from typing import Any, ClassVar

from miles_compat import calling

__all__ = ["SingletonMeta", "load_function"]


def load_function(path: str | None) -> Any:
    """What a path names; None where there is none, as for flags that nobody gave."""
    return calling.load_function(path) if path else None


class SingletonMeta(type):
    """The metaclass of classes that have one instance in a process."""

    _instances: ClassVar[dict[type, Any]] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in cls._instances:
            cls._instances[cls] = super().__call__(*args, **kwargs)
        return cls._instances[cls]

    @staticmethod
    def clear_all_instances() -> None:
        SingletonMeta._instances.clear()
