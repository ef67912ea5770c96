"""How a failure crosses from a worker to the driver, and which of several is the one to show.

When one rank of a group fails, others soon do too: a connection is reset, a collective times out. The first cause is
what a person needs: a process that died comes before an exception, an exception before a rank that says nothing.
"""

from __future__ import annotations

import concurrent.futures.thread
import pickle
import re
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from traceback import FrameSummary, StackSummary
from typing import Literal

from miles.errors import MilesError, WorkerError

PLUMBING = (threading.__file__, concurrent.futures.thread.__file__, str(Path(__file__).parent))
"""Where frames stand that say how a call came to a worker's method."""
TRACERS = "/opentelemetry/instrumentation/"
"""The same, where a library of an agent (strands) has wrapped the threads of its process."""
SEVERITY = ("died", "raised", "silent")
FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.M)


@dataclass(frozen=True)
class Failure:
    """Why a rank gave no answer."""

    rank: int
    kind: Literal["died", "raised", "silent"]
    text: str
    """The rank's traceback; or how its process ended and what it said last; or where it stands."""
    error: MilesError | None = None
    """What it raised, where that says everything already."""
    said: str = ""
    """What it raised, in a line."""

    @property
    def last_line(self) -> str:
        return self.said or self.text.strip().rpartition("\n")[2]

    @property
    def waits_for_others(self) -> bool:
        """Whether it is silent because it stands in a collective: then another rank is the cause."""
        return self.kind == "silent" and any("/torch/distributed/" in path for path, _, _ in self._frames[-3:])

    @property
    def _frames(self) -> list[tuple[str, str, str]]:
        """File, line and function of what stands in the text, of the first thread, innermost last."""
        return FRAME.findall(self.text.partition("\n\n")[0])


class WorkerFailure(Exception):
    """A `Failure` on its way to whoever waits for the answer."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


def raised(rank: int, error: BaseException) -> Failure:
    """What a worker says of an exception that it caught. Errors of miles cross as they are, if pickle can take them."""
    ours = error if isinstance(error, MilesError) and _survives(error) else None
    told = traceback.TracebackException.from_exception(error)
    told.stack = without_plumbing(told.stack[1:])  # the first is where it was caught
    said = next(told.format_exception_only()).strip().partition("\n")[0]
    return Failure(rank, "raised", "".join(told.format()).rstrip(), ours, said)


def without_plumbing(stack: Iterable[FrameSummary]) -> StackSummary:
    """The frames from a worker's own method on."""
    kept = list(dropwhile(_is_plumbing, stack))
    return StackSummary.from_list(kept)


def _is_plumbing(frame: FrameSummary) -> bool:
    return frame.filename.startswith(PLUMBING) or TRACERS in frame.filename


def _survives(error: MilesError) -> bool:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever somebody's constructor raises
        return False
    return type(copy) is type(error) and str(copy) == str(error)


def standing(rank: int, stacks: str, why: str) -> Failure:
    """Of a rank that gave no answer, by what `WorkerHost.stacks` says of it."""
    frames = Failure(rank, "silent", stacks)._frames
    place = ", in {2} ({0}:{1})".format(*frames[-1]) if frames else ""
    return Failure(rank, "silent", f"{stacks}\n{why}{place}")


def first_cause(failures: Sequence[Failure], who: str, method: str) -> tuple[MilesError, str]:
    """The error to raise, and one line that says it; `failures` are in the order in which they were heard of.

    A WorkerError has the traceback of the rank that was the first cause, then a line for each of the others. An error
    of miles is returned itself: its message is made for people.
    """
    first, *others = sorted(failures, key=lambda failure: (SEVERITY.index(failure.kind), failure.waits_for_others))
    headline = {
        "died": f"{who} rank {first.rank} died in {method}",
        "raised": f"{who} rank {first.rank} failed in {method}",
        "silent": f"{who} rank {first.rank} does not answer in {method}",
    }[first.kind]
    if first.error is not None:
        first.error.add_note(f"raised by {who} rank {first.rank} in {method}")
        return first.error, f"{headline}: {first.last_line}"
    lines = [f"{headline}:", first.text, *(f"then {who} rank {other.rank}: {other.last_line}" for other in others)]
    return WorkerError("\n".join(lines)), f"{headline}: {first.last_line}"
