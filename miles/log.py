"""The one logger of miles: plain lines on standard error, unless the program that uses miles has set up its own."""

import logging
import sys

logger = logging.getLogger("miles")


def counted(count: int, thing: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} {thing}{'s' * (count != 1)}"


def speak() -> None:
    """Let the logger be heard, if nobody else has seen to it."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logging.getLogger().handlers and not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
