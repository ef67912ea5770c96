"""Transport `broadcast`: engines live in processes of their own, and the first train rank sends to all of them at once.

All train ranks walk their weights together, since gathering a tensor may take all of them. The first fills buckets and
broadcasts them, over gloo from a CPU and over NCCL from a GPU: while one is on its way, the next is gathered. Engines
copy each bucket into place before they take the next. What is in a bucket is said in the driver's store.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from uuid import uuid4

import torch
from torch import distributed as dist

from miles.api import Metrics, RolloutEngine, SyncContext, WeightGroup, WeightSyncError, WorkerGroup
from miles.builtins.meeting import ENDED, FAILED, Meeting, Member
from miles.builtins.sync_partners import delivering, ranks, receivers, rounds, together, walked
from miles.toolkit import Shipment, pack, unpack

SEND, RECEIVED = f"{__name__}:send", f"{__name__}:received"


def send(weights: Iterable[WeightGroup], rank: int, meeting: Meeting, limit: int) -> tuple[int, int]:
    """Runs in every train rank; bytes and buckets that it sent."""
    with walked(weights) as walk:
        if rank:
            return 0, 0
        member = Member(meeting, 0)
        try:
            return _send(member, walk, limit)
        except BaseException as error:
            member.fail(error)
            raise


def _send(member: Member, weights: Iterator[WeightGroup], limit: int) -> tuple[int, int]:
    buckets = pack(weights, limit)
    first = next(buckets, None)
    if first is None:
        raise WeightSyncError("the trainer has no weights to send")
    member.join(first.bytes.device)
    sent, index, under_way = 0, 0, None
    try:
        for index, bucket in enumerate(itertools.chain([first], buckets)):
            if under_way is not None:
                under_way.wait()
            member.heed()
            member.say(f"bucket/{index}", [len(bucket.bytes), bucket.groups])
            under_way = member.broadcast(bucket.bytes)
            sent += len(bucket.bytes)
    finally:  # also when gathering failed: receivers wait for all of what was begun
        if under_way is not None:
            under_way.wait()
    member.say(f"bucket/{index + 1}", None)
    return sent, index + 1


def received(rank: int, meeting: Meeting) -> Iterator[WeightGroup]:
    """Runs where the engine is."""
    member = Member(meeting, rank)
    runs = _runs(member)
    try:
        member.join()
        for run, groups in runs:
            yield from unpack(run, groups)
    except GeneratorExit:
        member.forget()
        with suppress(Exception):  # whoever stops halfway must not keep the others waiting
            for _ in runs:
                pass
        raise
    except Exception as error:
        member.fail(error)
        raise


def _runs(member: Member) -> Iterator[tuple[torch.Tensor, list]]:
    for index in itertools.count():
        if (said := member.hear(f"bucket/{index}")) is None:
            return
        size, groups = said
        run = torch.empty(size, dtype=torch.uint8, device=member.device)
        member.broadcast(run).wait()
        yield run, groups


class BroadcastSync:
    """The driver's side."""

    transport = "broadcast"

    def __init__(self, *, context: SyncContext):
        self.context = context
        self._name, self._numbers = uuid4().hex, itertools.count()
        self._store: dist.TCPStore | None = None

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Raises WeightSyncError when an engine cannot receive this way, or shares a process with a train rank."""
        self.workers = workers
        found = receivers(self.transport, engines)
        self.rounds = await rounds(found)
        for place in await ranks(workers) if found else []:
            if any(place in members for members in self.rounds):
                raise WeightSyncError(
                    f"weight sync broadcast: an engine shares its process ({place}) with a train rank, and none can "
                    "send to itself; use --weight-sync inprocess"
                )
        self._members = f"members-{next(self._numbers)}"
        if self._store is None:
            self._store = dist.TCPStore(workers.address, 0, is_master=True, wait_for_workers=False)

    async def push(self, version: int) -> Metrics:
        """One walk for all engines; where several share a process, one for the first of each, then for the second."""
        with delivering(self.transport, version):
            sent = [await self._push(i, list(members.values()), version) for i, members in enumerate(self.rounds)]
        return {"weight_sync/bytes": float(sum(sent))}

    async def _push(self, number: int, engines: Sequence[RolloutEngine], version: int) -> int:
        assert self._store is not None
        meeting = Meeting(
            host=self.workers.address,
            port=self._store.port,
            sync=f"{self._name}/{number}",
            members=self._members,
            push=f"push-{next(self._numbers)}",
            size=1 + len(engines),
            timeout=self.context.timeout,
        )
        store = dist.PrefixStore(meeting.push, self._store)
        calls = [(SEND, rank, meeting, self.context.buffer_size) for rank in range(self.workers.size)]
        shipments = [Shipment(RECEIVED, {"rank": rank, "meeting": meeting}) for rank in range(1, meeting.size)]
        parts = [engine.receive(self.transport, version, s) for engine, s in zip(engines, shipments, strict=True)]
        outcomes = await together(
            [self.workers.call_each("send_weights", calls), *parts],
            on_failure=lambda part, error: store.set(FAILED if part else ENDED, json.dumps(str(error))),
        )
        sent, buckets = outcomes[0][0]
        said = ["start", *(f"here/{r}" for r in range(1, meeting.size)), *(f"bucket/{b}" for b in range(buckets + 1))]
        for key in said:
            store.delete_key(key)
        return sent
