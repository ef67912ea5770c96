"""Kinds of components, by any of the names that a person may have seen."""

from __future__ import annotations

from difflib import get_close_matches

from miles.errors import UnknownNameError
from miles.kinds import KINDS, Kind

NAMES = ", ".join(kind.word for kind in KINDS.values())
"""As commands list them."""


def kind_called(word: str) -> Kind:
    """The kind that a person means: `reward`, `rewards`, `policy-loss`, `policy_losses`; `rollout.engine` or `engine`,
    as it stands in a config.

    Raises:
        UnknownNameError: there is none of that name.
    """
    called = {kind.name: kind for kind in KINDS.values()}
    called |= {kind.word.replace("-", "_"): kind for kind in KINDS.values()}
    for kind in KINDS.values():
        for key in kind.keys:
            called.setdefault(key, kind)
            called.setdefault(key.rpartition(".")[2], kind)
    plain = word.replace("-", "_").replace(" ", "_").lower()
    if plain not in called:
        close = get_close_matches(plain, called, n=1)
        hint = f"; did you mean {called[close[0]].word!r}?" if close else ""
        raise UnknownNameError(f"{word!r} is no kind of component{hint}; kinds: {NAMES}")
    return called[plain]
