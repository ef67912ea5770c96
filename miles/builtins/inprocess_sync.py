"""Transport `inprocess`: engines live in the processes of the train ranks, so tensors are handed over by reference.

Each rank leaves its stream of weights at the door; the engine beside it walks the stream and copies each tensor into
place between two of its steps. Nobody holds a second copy of the model, unless the engine is busy generating and
therefore stages one. Ranks that share a model gather it together while they walk, so all their engines receive at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from miles.api import Metrics, RolloutEngine, SyncContext, WeightGroup, WeightSyncError, WorkerGroup
from miles.builtins.sync_partners import delivering, ranks, receivers, rounds, together
from miles.toolkit import Shipment

SEND, ARRIVED, FINISH = (f"{__name__}:{function}" for function in ("send", "arrived", "finish"))
_numbers = itertools.count()
_offered: dict[int, Stream] = {}
"""Streams on their way, by number: what crosses to a worker is data."""


class Stream:
    """A trainer's weights, to be walked once. Computed while it is walked, so the trainer must not learn meanwhile."""

    def __init__(self, weights: Iterable[WeightGroup]):
        self.weights, self.bytes = iter(weights), 0

    def __iter__(self) -> Iterator[WeightGroup]:
        for group in self.weights:
            self.bytes += sum(tensor.nbytes for tensor in group.values())
            yield group


def send(weights: Iterable[WeightGroup], number: int) -> None:
    """Runs in every train rank."""
    _offered[number] = Stream(weights)


def arrived(number: int) -> Stream:
    """Runs where the engine is."""
    if number not in _offered:
        raise WeightSyncError("weight sync inprocess: no train rank is in the engine's process")
    return _offered[number]


def finish(weights: Iterable[WeightGroup], number: int) -> int:
    """Runs in a train rank: walk what its engine left, as other ranks may wait for this one's part; bytes in all."""
    if (stream := _offered.pop(number, None)) is None:
        return 0
    for _ in stream:
        pass
    return stream.bytes


class InProcessSync:
    """The driver's side."""

    transport = "inprocess"

    def __init__(self, *, context: SyncContext):
        self.context = context

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Raises WeightSyncError when an engine cannot receive this way, or is not where a train rank is."""
        self.workers = workers
        found = receivers(self.transport, engines)
        self.rounds = await rounds(found)
        self.places = await ranks(workers) if found else []
        for members in self.rounds:
            if strays := members.keys() - set(self.places):
                raise WeightSyncError(
                    f"weight sync inprocess: an engine is in another process ({min(strays)}) than the train ranks "
                    f"({', '.join(self.places)}); use --executor inprocess, or another --weight-sync transport"
                )
            if len(members) < workers.size:
                raise WeightSyncError(
                    f"weight sync inprocess: {workers.size} train ranks walk their weights together, with an engine "
                    f"beside {len(members)} of them; it takes one engine a rank, or another --weight-sync transport"
                )

    async def push(self, version: int) -> Metrics:
        """Of several engines in one process, one after the other gets a walk over the trainer's weights."""
        with delivering(self.transport, version):
            sent = [await self._push(members, version) for members in self.rounds]
        return {"weight_sync/bytes": float(sum(sent))}

    async def _push(self, members: Mapping[str, RolloutEngine], version: int) -> int:
        number = next(_numbers)
        await self.workers.call("send_weights", SEND, number)
        handed = (self._hand_over(self.places.index(place), members[place], version, number) for place in members)
        await together(handed)
        return sum(await self.workers.call("send_weights", FINISH, number))

    async def _hand_over(self, rank: int, engine: RolloutEngine, version: int, number: int) -> None:
        try:
            await engine.receive(self.transport, version, Shipment(ARRIVED, {"number": number}))
        except BaseException:
            with suppress(Exception):  # that of the engine is the one to show
                await self.workers.call_one(rank, "send_weights", FINISH, number)
            raise
