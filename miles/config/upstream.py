"""What to use here instead of flags of slime and Miles that are spelt or done otherwise."""

from __future__ import annotations

REPLIES: dict[str, str] = {}


def reply_to(flag: str) -> str | None:
    """What to use instead of an upstream flag; None when it is none, or is accepted here as it is."""
    return REPLIES.get(flag.removeprefix("--"))
