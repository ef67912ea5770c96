"""Python's garbage collector in a process that has been built and begins to work."""

from __future__ import annotations

import gc

YOUNG = 50_000
"""Containers, made and not freed since, at which it looks. A reply of a thousand tokens with log-probabilities is a
thousand lists that die without it: at Python's 700 they take a quarter of what a client's process does."""
USUAL = gc.get_threshold()


def settle() -> None:
    """Take what imports and building have made out of the collector's sight, as it lives as long as the process, and
    have it look less often. To look through all of it again costs a third of a second every few steps."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *USUAL[1:])


def unsettle() -> None:
    """Whoever lets go of what was built gets its memory back."""
    gc.unfreeze()
    gc.set_threshold(*USUAL)
