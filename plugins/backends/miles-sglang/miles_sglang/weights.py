"""Weights from this process to servers on the same GPUs: flat buckets, handed over by CUDA IPC without a copy through
the host.

Two buckets take turns: while servers load one, the next is gathered and packed in the thread that computes. What goes
over HTTP is a handle of the bucket's memory and where in it each tensor lies (`load_format: flattened_bucket`). Facts
of SGLang 0.5.17 that this rests on:

- A server opens a handle, copies, closes it, and waits for its stream before it answers: then a bucket may be filled
  anew. Each handle counts its readers, so every tensor-parallel rank of every server gets one of its own.
- A rank of a server that can sleep could not copy from another GPU: "invalid argument", said CUDA, probably since
  memory that can be released is mapped for one GPU. So each finds the bucket on its own.
- A handle names its GPU by UUID, because server and trainer may number theirs differently. The server's torch is
  patched to understand that; here the number is replaced while a handle is pickled, and nothing is patched.
- Tensors are views of the bucket's bytes, so each starts at a multiple of 16. What says where (`metadata`) is read by
  its attributes; the server unpickles a namespace but nothing of ours.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from miles.api import WeightSyncError
from miles.toolkit import Bucket, compute_thread, opened, pack, places

BUCKET = 512 * 1024**2
"""Bytes; a larger group of tensors has a bucket of its own."""
DEVICE = 6
"""Which argument of `rebuild_cuda_tensor` says the device."""

Handles = Sequence[Sequence[str]]
"""One for each tensor-parallel rank of each server, as `serialized_named_tensors` takes them."""
Homes = Sequence[Sequence[str]]
"""The device of each tensor-parallel rank of each server."""


async def hand_over(
    payload: Any,
    post: Callable[[Handles], Awaitable[Any]],
    *,
    homes: Homes,
    limit: int = BUCKET,
) -> None:
    """Walk a payload to its end, bucket by bucket.

    Args:
        payload: groups of weights, or a `Shipment` of them. A group is never divided.
        post: gives handles to the servers, and returns when all of them have loaded what these hold.
        homes: buckets are made at the first of these devices, and copied to the others.

    Raises:
        WeightSyncError: the payload holds none. Besides what `post` and the payload
            raise; servers may then hold a mixture.
    """
    loop, thread = asyncio.get_running_loop(), compute_thread()
    parcels = _parcels(payload, homes, limit)
    posted: asyncio.Future[Any] | None = None
    try:
        while (parcel := await loop.run_in_executor(thread, next, parcels, None)) is not None:
            if posted is not None:
                await asyncio.shield(posted)
            posted = asyncio.ensure_future(parcel.sent_by(post))
            await asyncio.sleep(0)  # it is on its way before the next bucket is begun
        if posted is None:
            raise WeightSyncError("the weight sync brought no weights")
        await asyncio.shield(posted)
    finally:
        if posted is not None:  # servers read its bucket
            await asyncio.gather(posted, return_exceptions=True)
        parcel = None
        await loop.run_in_executor(thread, parcels.close)
        await loop.run_in_executor(thread, _give_back)


@dataclass(frozen=True)
class _Parcel:
    buckets: Sequence[Bucket]
    handles: Handles

    async def sent_by(self, post: Callable[[Handles], Awaitable[Any]]) -> None:
        """As a method: what is read lives as long as this runs, also when there is no bucket after it."""
        await post(self.handles)


def _parcels(payload: Any, homes: Homes, limit: int) -> Generator[_Parcel, None, None]:
    devices = {home for server in homes for home in server}
    with opened(payload) as groups:
        for bucket in pack(groups, limit, homes[0][0]):
            at = {device: _copied(bucket, device, limit) for device in devices}
            handles = [[handle_of(at[home]) for home in server] for server in homes]
            yield _Parcel(list(at.values()), handles)


def _copied(bucket: Bucket, device: str, limit: int) -> Bucket:
    """The bucket itself, where it is on this device. Who opens the handle of a copy waits for it on the GPU."""
    if bucket.bytes.device == torch.device(device):
        return bucket
    size = len(bucket.bytes)
    whole = torch.empty(max(limit, size), dtype=torch.uint8, device=device)  # of one size: the next has its memory
    return replace(bucket, bytes=whole[:size].copy_(bucket.bytes))


def handle_of(bucket: Bucket) -> str:
    """For one reader: base64 of a pickled mapping. Its memory must live until the reader has let go of it."""
    metadata = [
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=getattr(torch, entry.dtype),
            start_idx=place.start,
            end_idx=place.stop,
            numel=place.stop - place.start,
        )
        for group in places(bucket.groups)
        for entry, place in group
    ]
    pickled = io.BytesIO()
    _Pickler(pickled).dump({"flattened_tensor": bucket.bytes, "metadata": metadata})
    return base64.b64encode(pickled.getvalue()).decode()


class _Pickler(ForkingPickler):
    """Pickles a tensor as a handle of its memory."""

    def reducer_override(self, obj: Any) -> Any:
        if not (isinstance(obj, Tensor) and obj.is_cuda):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(obj)
        return rebuild, by_uuid(arguments)


def by_uuid(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that rebuild a tensor of CUDA memory, with the UUID of its GPU instead of the number it has here."""
    device = arguments[DEVICE]
    if isinstance(device, int):
        device = str(torch.cuda.get_device_properties(device).uuid)
    return (*arguments[:DEVICE], device, *arguments[DEVICE + 1 :])


def _give_back() -> None:
    """Memory of buckets, now that nobody reads them: an engine that wakes needs it."""
    if torch.cuda.is_initialized():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
