"""Transport `inprocess`: trainer and engine share one process, so tensors are handed over by reference.

The trainer leaves its stream of weights at the door; the engine walks the stream and copies each tensor into place
between two of its steps. Nobody holds a second copy of the model, unless the engine is busy generating and therefore
stages one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from miles.api import Metrics, RolloutEngine, WeightGroup, WeightSyncError, WorkerGroup

SEND = "miles.builtins.inprocess_sync:send"
_numbers = itertools.count()
_offered: dict[int, Stream] = {}
"""Streams on their way, by number: what crosses to a worker is data."""


class Stream:
    """A trainer's weights, to be walked once. Computed while it is walked, so the trainer must not learn meanwhile."""

    def __init__(self, weights: Iterable[WeightGroup]):
        self.weights, self.bytes = weights, 0

    def __iter__(self) -> Iterator[WeightGroup]:
        for group in self.weights:
            self.bytes += sum(tensor.nbytes for tensor in group.values())
            yield group


def send(weights: Iterable[WeightGroup], number: int) -> None:
    """Runs in the train worker."""
    _offered[number] = Stream(weights)


class InProcessSync:
    """The driver's side."""

    transport = "inprocess"

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Raises WeightSyncError when there are several workers, or an engine cannot receive this way."""
        if workers.size != 1:
            raise WeightSyncError(
                f"weight sync inprocess: it walks the weights of one worker, and there are {workers.size}; choose "
                "another --weight-sync"
            )
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
        number = next(_numbers)
        try:
            await self.workers.call("send_weights", SEND, number=number)
            if number not in _offered:
                raise WeightSyncError(
                    "weight sync inprocess: the train worker runs in another process than the engine; use --executor "
                    "inprocess, or another --weight-sync transport"
                )
            stream = _offered[number]
            await engine.receive(self.transport, version, stream)
            return stream.bytes
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(
                f"weight sync inprocess: version {version} did not arrive: {type(error).__name__}: {error}"
            ) from error
        finally:
            _offered.pop(number, None)
