"""Transport `inprocess`: trainer and engine share one process, so tensors are handed over by reference.

The trainer's thread offers its stream of weights and waits; the engine walks the stream and copies each tensor into
place between two of its steps. Nobody holds a second copy of the model, unless the engine is busy generating and
therefore stages one.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence

from miles.api import Metrics, RolloutEngine, WeightGroup, WeightSyncError, WorkerGroup

SEND = "miles.builtins.inprocess_sync:send"
_numbers = itertools.count()
_open: dict[int, Handover] = {}
"""Hand-overs under way, by number: what crosses to a worker is data."""


class Handover:
    """One stream of weights on its way from a thread of the trainer to whoever iterates over this, once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._weights: Iterable[WeightGroup] | None = None
        self._claim = threading.Lock()
        self._offered, self._finished = threading.Event(), threading.Event()

    def offer(self, weights: Iterable[WeightGroup]) -> None:
        """The sender's side: returns once the receiver is done. Further ranks walk along, for their collectives."""
        if not self._claim.acquire(blocking=False):
            for _ in weights:
                pass
            return
        self._weights = weights
        self._offered.set()
        self._finished.wait()

    def __iter__(self) -> Iterator[WeightGroup]:
        self._offered.wait()
        if self._weights is None:
            raise WeightSyncError("weight sync inprocess: the trainer sent nothing")
        for group in self._weights:
            self.bytes += sum(tensor.nbytes for tensor in group.values())
            yield group

    def close(self) -> None:
        """Let both sides go, whatever they are waiting for."""
        self._finished.set()
        self._offered.set()


def send(weights: Iterable[WeightGroup], handover: int) -> None:
    """Runs in a train worker's thread."""
    if handover not in _open:
        raise WeightSyncError(
            "weight sync inprocess: this worker runs in another process than the engine; "
            "use --executor inprocess, or another --weight-sync transport"
        )
    _open[handover].offer(weights)


class InProcessSync:
    """The driver's side."""

    transport = "inprocess"

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Raises WeightSyncError when an engine cannot receive this way."""
        self.workers = workers
        self.engines = [engine for engine in engines if engine.generates]
        for engine in self.engines:
            if self.transport not in engine.accepts:
                raise WeightSyncError(
                    f"weight sync inprocess: {type(engine).__name__} receives weights by "
                    f"{', '.join(sorted(engine.accepts)) or 'no transport'}; choose one of these with --weight-sync"
                )

    async def push(self, version: int) -> Metrics:
        """One walk over the trainer's weights for each engine."""
        sent = [await self._push(engine, version) for engine in self.engines]
        return {"weight_sync/bytes": float(sum(sent))}

    async def _push(self, engine: RolloutEngine, version: int) -> int:
        number, handover = next(_numbers), Handover()
        _open[number] = handover
        sending = asyncio.ensure_future(self.workers.call("send_weights", SEND, handover=number))
        receiving = asyncio.ensure_future(engine.receive(self.transport, version, handover))
        for side in (sending, receiving):  # when one ends, for whatever reason, the other must not wait for it
            side.add_done_callback(lambda _: handover.close())
        try:
            outcomes = await asyncio.gather(sending, receiving, return_exceptions=True)
        finally:
            handover.close()
            del _open[number]
        for error in outcomes:
            if isinstance(error, WeightSyncError):
                raise error
            if isinstance(error, BaseException):
                raise WeightSyncError(
                    f"weight sync inprocess: version {version} did not arrive: {type(error).__name__}: {error}"
                ) from error
        return handover.bytes
