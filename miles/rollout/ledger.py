"""What became of every rollout that was ever started: none vanishes silently.

A rollout is what one sample id was given out for; siblings that it was cut into share it. It is pending until it gets
its one fate: trained, or dropped for a reason that has a name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from miles.errors import RolloutError

TRAINED = "trained"
REMOVED = "removed"
"""By a plugin, after the batch was full (`miles_modify_samples`)."""


class Ledger:
    """Counts since the beginning of the run, and names of what is pending."""

    def __init__(self) -> None:
        self.started = 0
        self.restarted = 0
        """Times that one began again from its prompt, having lost what it had; it keeps its id."""
        self.fates = Counter[str]()
        self.pending: set[int] = set()

    def start(self, rollouts: Iterable[int]) -> None:
        """Raises RolloutError: one of them was started before."""
        before, given = len(self.pending), list(rollouts)
        self.pending.update(given)
        if len(self.pending) != before + len(given):
            raise RolloutError(f"rollouts {given}: one of these ids is in use")
        self.started += len(given)

    def settle(self, rollouts: Collection[int], fate: str) -> None:
        """Raises RolloutError: one of them has its fate already, or was never started."""
        if strangers := set(rollouts) - self.pending:
            raise RolloutError(f"rollouts {sorted(strangers)} are to be {fate}, and none of them is pending")
        self.pending.difference_update(rollouts)
        self.fates[fate] += len(rollouts)

    def remove(self, count: int) -> None:
        """So many of those that were to be trained are not."""
        self.fates.subtract({TRAINED: count})
        self.fates[REMOVED] += count

    def check(self, held: Collection[int]) -> None:
        """Every rollout has one fate or is held by somebody.

        Raises:
            RolloutError: a rollout has vanished, or one that has its fate is still there.
        """
        held = set(held)
        if held != self.pending or self.started != self.fates.total() + len(held):
            raise RolloutError(
                f"{self.started} rollouts were started, {self.fates.total()} have met their fate and {len(held)} are "
                f"held; nobody holds {sorted(self.pending - held)[:8]}, and {sorted(held - self.pending)[:8]} are held "
                "without being pending: a defect of miles, or of a generate function that gives samples other ids"
            )

    def state_dict(self) -> dict[str, Any]:
        """Without what is pending, which whoever holds it saves."""
        return {"started": self.started, "restarted": self.restarted, "fates": dict(self.fates)}

    def load_state_dict(self, state: Mapping[str, Any], pending: Iterable[int]) -> None:
        self.started, self.restarted, self.fates = state["started"], state["restarted"], Counter(state["fates"])
        self.pending = set(pending)
