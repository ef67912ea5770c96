"""How a tensor's bytes changed, as few bytes.

A step of training changes few bits: at a learning rate of 1e-6 most bf16 weights stay what they were. Two encodings,
both over the uint8 view of a tensor:

- `xor`: new ^ old. Zero wherever nothing changed, which compresses well; applied twice it is undone.
- `overwrite`: how many bytes differ (u4), where (u4 each), and what they become. Applied twice it is applied once.

Each tensor's new bytes have a checksum, so that a difference applied to anything but its base is found out.
"""

from __future__ import annotations

import hashlib
import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.api import ConfigError, WeightSyncError

COUNT = np.dtype("<u4")


def bytes_of(tensor: Tensor) -> np.ndarray:
    """`[n]` uint8: the bytes of a tensor, in the machine's memory; a view of it if it is there already."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def encode(new: np.ndarray, old: np.ndarray, encoding: str) -> tuple[bytes, int]:
    """The difference of two `[n]` uint8, and how many bytes differ."""
    differs = new ^ old
    changed = int(np.count_nonzero(differs))
    if encoding == "xor":
        return differs.tobytes(), changed
    if len(new) >= 2**32:
        raise WeightSyncError(f"encoding overwrite takes tensors below 4 GiB, not {len(new)} bytes; choose xor")
    places = np.flatnonzero(differs)
    return b"".join([COUNT.type(changed).tobytes(), places.astype(COUNT).tobytes(), new[places].tobytes()]), changed


def apply(old: np.ndarray, difference: bytes, encoding: str) -> np.ndarray:
    """The new bytes; `old` is left as it is. Raises WeightSyncError when the difference is of another length."""
    if encoding == "xor":
        if len(difference) != len(old):
            raise WeightSyncError(f"it has {len(old)} bytes here and {len(difference)} there")
        return old ^ np.frombuffer(difference, np.uint8)
    count = int(np.frombuffer(difference, COUNT, 1)[0])
    places = np.frombuffer(difference, COUNT, count, COUNT.itemsize)
    if count and int(places.max()) >= len(old):
        raise WeightSyncError(f"it has {len(old)} bytes here, and byte {int(places.max())} changed there")
    new = old.copy()
    new[places] = np.frombuffer(difference, np.uint8, count, COUNT.itemsize * (1 + count))
    return new


# --------------------------------------------------------------------------------------------- compression, checksums


@dataclass(frozen=True)
class Codec:
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]
    damage: type[Exception] = ValueError
    """What `decompress` raises for bytes that `compress` did not make."""


def codec(name: str) -> Codec:
    """`zstd`, `zlib` or `none`, at their fastest levels.

    Raises:
        ConfigError: there is no zstd: it came with Python 3.14, and before that in the package backports.zstd.
    """
    if name == "zstd":
        zstd = _first_of("compression.zstd", "backports.zstd")
        if zstd is None:
            raise ConfigError(
                "weights are to be compressed with zstd, which is not installed: pip install 'miles[delta]', or "
                "compression: zlib"
            )
        return Codec(lambda data: zstd.compress(data, 1), zstd.decompress, zstd.ZstdError)
    if name == "zlib":
        return Codec(lambda data: zlib.compress(data, 1), zlib.decompress, zlib.error)
    return Codec(bytes, bytes)


def best_compression() -> str:
    """zstd where it is installed; zlib always is."""
    return "zstd" if _first_of("compression.zstd", "backports.zstd") else "zlib"


def best_checksum() -> str:
    """xxh3-128 where xxhash is installed, which keeps up with the memory; blake2b always is."""
    return "xxh3-128" if _first_of("xxhash") else "blake2b"


def checksum(data: np.ndarray, kind: str) -> str:
    """Of `[n]` uint8, in hexadecimal.

    Raises:
        WeightSyncError: it cannot be computed here.
    """
    if kind == "blake2b":
        return hashlib.blake2b(data.data, digest_size=16).hexdigest()
    xxhash = _first_of("xxhash")
    if kind != "xxh3-128" or xxhash is None:
        raise WeightSyncError(f"checksums of kind {kind!r} cannot be computed here: pip install 'miles[delta]'")
    return xxhash.xxh3_128_hexdigest(data)


def _first_of(*modules: str) -> Any:
    for module in modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
    return None
