"""Transport `disk`: the first train rank writes a folder, engines read it. Anything that shares a file system will do.

`full` writes `weight_v000012/` as a Hugging Face checkpoint. `delta` does so once; from then on a folder holds, for
each tensor that changed, how its bytes differ from the last push (`miles.builtins.delta`): the sender keeps a copy of
those in the machine's memory, and an engine applies the difference to its own weights. Folders appear whole or not at
all. An engine that is not where the others are, because it was replaced, or because a push failed, makes the next push
a full one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from miles.api import Metrics, RolloutEngine, SyncContext, WeightGroup, WeightSyncError, WorkerGroup
from miles.builtins.delta import apply, best_checksum, best_compression, bytes_of, checksum, codec, encode
from miles.builtins.options import DiskOptions
from miles.builtins.sync_partners import delivering, receivers, together, walked
from miles.toolkit import Shipment, put_in_place, read_weights, sync_tree, write_checkpoint, write_safetensors

WRITE, WRITE_CHANGES, READ, READ_CHANGES = (
    f"{__name__}:{function}" for function in ("write", "write_changes", "read", "read_changes")
)
KEPT = 2
"""Newest folders that stay."""
INDEX = "model.safetensors.index.json"
_sent: dict[str, dict[str, np.ndarray]] = {}
"""In the first train rank, by sync: name -> the bytes that were sent last."""


@dataclass
class Written:
    """What a train rank wrote."""

    bytes: int = 0
    """Of weights, as they lie on the disk."""
    changed: int = 0
    """Bytes that differ from those of the last push."""
    total: int = 0


@dataclass(frozen=True)
class Format:
    """What a reader must know of a folder of changes; its index says it."""

    version: int
    base_version: int
    delta_encoding: str
    compression_format: str
    checksum_format: str = field(default_factory=best_checksum)

    def metadata(self) -> dict[str, str]:
        return {name: f"{value:06d}" if isinstance(value, int) else value for name, value in vars(self).items()}


# ------------------------------------------------------------------------------------------------------------ writing


def write(weights: Iterable[WeightGroup], rank: int, folder: str, checkpoint: str, remember: str | None) -> Written:
    """Runs in every train rank: a whole checkpoint. `remember`: the sync that will want to know what was sent."""
    written, sent = Written(), dict[str, np.ndarray]()

    def watched(walk: Iterable[WeightGroup]) -> Iterator[WeightGroup]:
        for group in walk:
            for name, tensor in group.items():
                written.bytes += tensor.nbytes
                if remember:
                    sent[name] = bytes_of(tensor).copy()
            yield group

    with walked(weights) as walk:
        if rank == 0:
            write_checkpoint(Path(folder), watched(walk), Path(checkpoint))
    if remember and rank == 0:
        _sent[remember] = sent
    return Written(written.bytes, written.bytes, written.bytes)


def write_changes(
    weights: Iterable[WeightGroup], rank: int, folder: str, sync: str, form: Format, shard_bytes: int
) -> Written:
    """Runs in every train rank: how weights differ from those of the last push."""
    final = Path(folder)
    beside = final.with_name(f".{final.name}.partial")
    with walked(weights) as walk:
        if rank:
            return Written()
        sent = _sent.pop(sync)  # if this fails halfway it is neither the old nor the new
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            written = _write_changes(walk, beside, sent, form, shard_bytes)
            put_in_place(beside, final)
        except (OSError, SafetensorError) as error:
            raise WeightSyncError(f"{final} could not be written: {error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        _sent[sync] = sent
        return written


def _write_changes(
    walk: Iterator[WeightGroup], folder: Path, sent: dict[str, np.ndarray], form: Format, shard_bytes: int
) -> Written:
    written, shards = Written(), _Shards(folder, shard_bytes)
    compress = codec(form.compression_format).compress
    for group in walk:
        for name, tensor in group.items():
            new = bytes_of(tensor)
            difference, changed = encode(new, sent[name], form.delta_encoding)
            written.total += len(new)
            written.changed += changed
            if changed:
                shards.add(name, compress(difference), checksum(new, form.checksum_format))
                np.copyto(sent[name], new)
    written.bytes = shards.close(form)
    sync_tree(folder)
    return written


class _Shards:
    """Safetensors files of at most so many bytes, each tensor's checksum in its file's metadata."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.pending: dict[str, Tensor] = {}
        self.checksums: dict[str, str] = {}
        self.files: list[list[str]] = []
        self.size = self.bytes = 0

    def add(self, name: str, data: bytes, digest: str) -> None:
        if self.pending and self.size + len(data) > self.limit:
            self._flush()
        self.pending[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.checksums[name] = digest
        self.size += len(data)

    def _flush(self) -> None:
        path = self.folder / f"{len(self.files)}.part"
        write_safetensors(self.pending, path, self.checksums)
        self.files.append(list(self.pending))
        self.bytes += path.stat().st_size
        self.pending, self.checksums, self.size = {}, {}, 0

    def close(self, form: Format) -> int:
        """Name the files, now that their number is known, and write the index; bytes of all files."""
        if self.pending:
            self._flush()
        placed: dict[str, str] = {}
        for index, names in enumerate(self.files):
            file = f"model-{index:05d}-of-{len(self.files):05d}.safetensors"
            (self.folder / f"{index}.part").rename(self.folder / file)
            placed |= dict.fromkeys(names, file)
        text = json.dumps({"metadata": form.metadata(), "weight_map": placed}, indent=2)
        (self.folder / INDEX).write_text(text + "\n")
        return self.bytes + len(text) + 1


# ------------------------------------------------------------------------------------------------------------ reading


def read(folder: str) -> Iterator[WeightGroup]:
    """Runs where the engine is: a whole checkpoint."""
    return read_weights(Path(folder))


def read_changes(held: Iterable[WeightGroup], folder: str) -> Iterator[WeightGroup]:
    """Runs where the engine is: what it holds, with the changes applied.

    Raises:
        WeightSyncError: what it holds is not what the changes were made for; or a file is damaged, or missing.
    """
    with ExitStack() as stack:
        try:
            index = json.loads((Path(folder) / INDEX).read_text())
            form, placed = index["metadata"], dict(index["weight_map"])
            files = {name: stack.enter_context(safe_open(Path(folder) / name, "pt")) for name in set(placed.values())}
        except (OSError, ValueError, SafetensorError) as error:
            raise WeightSyncError(f"the changes in {folder} cannot be read: {error}") from error
        checksums = {name: file.metadata() for name, file in files.items()}
        compression = codec(form["compression_format"])
        for group in held:
            changed = {}
            for name in group.keys() & placed.keys():
                file = placed.pop(name)
                try:
                    difference = compression.decompress(bytes_of(files[file].get_tensor(name)).tobytes())
                    new = apply(bytes_of(group[name]), difference, form["delta_encoding"])
                except (ValueError, compression.damage, SafetensorError, WeightSyncError) as error:
                    raise WeightSyncError(f"the changes of {name!r} in {folder} cannot be applied: {error}") from error
                if checksum(new, form["checksum_format"]) != checksums[file][name]:
                    raise WeightSyncError(
                        f"the changes of {name!r} in {folder} were made for other bytes than this engine holds: those "
                        f"of version {int(form['base_version'])}, in the trainer's dtype; or they are damaged"
                    )
                tensor = group[name]
                changed[name] = torch.from_numpy(new).view(tensor.dtype).view(tensor.shape).to(tensor.device)
            yield {**group, **changed}
    if placed:
        raise WeightSyncError(f"{folder} has changes of {min(placed)!r}, which this engine does not hold")


# --------------------------------------------------------------------------------------------------------- the driver


class DiskSync:
    """The driver's side."""

    transport = "disk"

    def __init__(self, options: DiskOptions | None = None, *, context: SyncContext):
        self.options, self.context = options or DiskOptions(), context
        self.directory = Path(self.options.dir) if self.options.dir else context.run_dir / "weights"
        chosen = self.options.compression
        self.compression = best_compression() if chosen == "auto" else chosen
        codec(self.compression)  # said now, and not by a worker in the second step
        self._name = uuid4().hex
        self._base: int | None = None
        """What every engine and the sender's copy are at, if that is known."""
        # Those of an earlier life of this run go as others come; of a folder that was named nothing is known.
        self._folders = [] if self.options.dir else sorted(self.directory.glob("weight_v*"))

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Raises WeightSyncError when an engine cannot receive this way."""
        self.workers, self.engines = workers, receivers(self.transport, engines)
        self._base = None

    async def push(self, version: int) -> Metrics:
        """Write once, and let every engine read."""
        if not self.engines:
            return {"weight_sync/bytes": 0.0}
        folder = self.directory / f"weight_v{version:06d}"
        with delivering(self.transport, version):
            base = await self._common_base()
            self._base = None
            if base is None:
                written = await self._write(partial(self._full, folder))
                shipment = Shipment(READ, {"folder": str(folder)})
            else:
                form = Format(version, base, self.options.encoding, self.compression)
                written = await self._write(partial(self._changes, folder, form))
                shipment = Shipment(READ_CHANGES, {"folder": str(folder)}, changes=True)
            await together(engine.receive(self.transport, version, shipment) for engine in self.engines)
        self._base = version
        self._tidy(folder)
        density = {"weight_sync/density": written.changed / written.total} if self.options.mode == "delta" else {}
        return {"weight_sync/bytes": float(written.bytes), **density}

    async def _common_base(self) -> int | None:
        """The version that changes may be sent against; None for a full push."""
        if self.options.mode == "full" or self._base is None:
            return None
        versions = {(await engine.health()).weight_version for engine in self.engines}
        return self._base if versions == {self._base} else None

    def _full(self, folder: Path, rank: int) -> tuple[Any, ...]:
        remember = self._name if self.options.mode == "delta" else None
        return WRITE, rank, str(folder), str(self.context.checkpoint), remember

    def _changes(self, folder: Path, form: Format, rank: int) -> tuple[Any, ...]:
        return WRITE_CHANGES, rank, str(folder), self._name, form, self.context.buffer_size

    async def _write(self, arguments: Any) -> Written:
        calls = [arguments(rank) for rank in range(self.workers.size)]
        return (await self.workers.call_each("send_weights", calls))[0]

    def _tidy(self, folder: Path) -> None:
        """All engines have this one: the oldest may go."""
        self._folders = [*(other for other in self._folders if other != folder), folder]
        for old in self._folders[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self._folders = self._folders[-KEPT:]
