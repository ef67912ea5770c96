"""Do engine and trainer hold the same numbers? Bit for bit, tensor by tensor, by the names of the checkpoint.

A digest is 64 bits, computed where a tensor lies: its bits, as words, are mixed with their places and added up. Any
device comes to the same digest, and nothing but that leaves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from miles.errors import WeightSyncError
from miles.log import counted
from miles.protocols import RolloutEngine, WorkerGroup
from miles.types import WeightGroup

TARGET = f"{__name__}:checksums"
CHUNK = 2**24
"""Bytes looked at at once: what this needs of memory does not grow with a tensor."""
FACTORS = tuple(factor - 2**64 for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers: products wrap around."""
SHOWN = 8


def checksums(weights: Iterable[WeightGroup]) -> dict[str, str]:
    """Name -> dtype and digest."""
    return {name: f"{tensor.dtype} {digest(tensor):016x}" for group in weights for name, tensor in group.items()}


def digest(tensor: Tensor) -> int:
    """64 bits that say all of a tensor's bits in their order."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    place, mix, stir = FACTORS
    total = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK]
        words = torch.zeros(-(-len(part) // 8), dtype=torch.int64, device=bits.device)
        words.view(torch.uint8)[: len(part)] = part
        words ^= torch.arange(start // 8 + 1, start // 8 + 1 + len(words), device=bits.device) * place
        words *= mix
        words ^= words >> 29
        words *= stir
        words ^= words >> 32
        total += int(words.sum())
    return total % 2**64


async def compare_checksums(workers: WorkerGroup, engines: Sequence[RolloutEngine], version: int) -> None:
    """Of the trainer, and of each engine that offers `checksums`. A tensor whose dtype differs is passed over: it was
    rounded on its way, and log-probabilities tell whether that matters.

    Raises:
        WeightSyncError: names the first engine that holds something else, and the tensors.
    """
    asked = {index: engine.checksums() for index, engine in enumerate(engines) if hasattr(engine, "checksums")}
    if not asked:
        return
    answers = await asyncio.gather(*asked.values())
    expected = (await workers.call("send_weights", TARGET))[0]
    for index, found in zip(asked, answers, strict=True):
        both = [n for n, said in expected.items() if n in found and found[n].split()[0] == said.split()[0]]
        if wrong := [name for name in both if found[name] != expected[name]]:
            more = " ..." if len(wrong) > SHOWN else ""
            raise WeightSyncError(
                f"after the sync of version {version}, engine {index} holds other numbers than the trainer in "
                f"{len(wrong)} of {counted(len(both), 'tensor')}: {', '.join(wrong[:SHOWN])}{more}. They were lost or "
                "exchanged on their way: check the weight sync and the bridge"
            )
