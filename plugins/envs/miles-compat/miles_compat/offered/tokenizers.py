"""`utils.processing_utils`."""

from __future__ import annotations

from typing import Any

from miles_compat.model import load_tokenizer

__all__ = ["load_processor", "load_tokenizer"]


def load_processor(name_or_path: str, **kwargs: Any) -> None:
    """None, as upstream says of a checkpoint that takes only text: engines of miles do."""
