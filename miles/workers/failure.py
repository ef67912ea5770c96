"""How a failure crosses from a worker to the driver, and which of several is the one to show.

When one rank of a group fails, others soon do too: a connection is reset, a collective times out. The first cause is
what a person needs: a process that died comes before an exception, an exception before a rank that says nothing.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from miles.errors import MilesError, WorkerError

SEVERITY = ("died", "raised", "silent")


@dataclass(frozen=True)
class Failure:
    """Why a rank gave no answer."""

    rank: int
    kind: Literal["died", "raised", "silent"]
    text: str
    """The rank's traceback; or how its process ended and what it said last; or where it stands."""
    error: MilesError | None = None
    """What it raised, where that says everything already."""

    @property
    def last_line(self) -> str:
        return self.text.strip().rpartition("\n")[2]


class WorkerFailure(Exception):
    """A `Failure` on its way to whoever waits for the answer."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


def raised(rank: int, error: BaseException) -> Failure:
    """What a worker says of an exception. Errors of miles cross as they are, if pickle can take them."""
    ours = error if isinstance(error, MilesError) and _survives(error) else None
    return Failure(rank, "raised", "".join(traceback.format_exception(error)).rstrip(), ours)


def _survives(error: MilesError) -> bool:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever somebody's constructor raises
        return False
    return type(copy) is type(error) and str(copy) == str(error)


def raise_first(failures: Sequence[Failure], who: str, method: str) -> NoReturn:
    """Raise the first cause; `failures` are in the order in which they were heard of.

    Raises:
        WorkerError: with the rank's traceback, then a line for each of the others. An error of miles is raised
            itself: its message is made for people.
    """
    first, *others = sorted(failures, key=lambda failure: SEVERITY.index(failure.kind))
    if first.error is not None:
        first.error.add_note(f"raised by {who} rank {first.rank} in {method}")
        raise first.error
    verb = {"died": "died", "raised": "failed", "silent": "does not answer"}[first.kind]
    lines = [f"{who} rank {first.rank} {verb} in {method}:", first.text]
    lines += [f"then {who} rank {other.rank}: {other.last_line}" for other in others]
    raise WorkerError("\n".join(lines))
