"""No quantisation: everything in fp32 (or fp64), or forward and backward in bf16 over fp32 master weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from miles.api import WeightGroup

TOLERANCE = {"fp64": 1e-4, "fp32": 1e-4, "bf16": 0.15}
"""Largest mean difference of log-probabilities, in nats, over tokens drawn at random. Two right programs in fp32 differ
by some 1e-6. In bf16 the logits alone, 10 to 20 for such tokens, are rounded to a sixteenth; two programs of 28 random
layers were 0.05 apart. A matrix that does not arrive makes a difference of 1 and more."""
SPELLINGS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}


class PlainPrecision:
    """The number formats of `train.dtype` (`PrecisionScheme`). The backend holds the parameters and casts them."""

    def __init__(self) -> None:
        self.dtype = "fp32"

    @property
    def logprob_tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def configure(self, backend: str, model_config: dict[str, Any]) -> None:
        """Reads `dtype`: fp64, fp32 or bf16, as `train.dtype` or as transformers spells it.

        Raises:
            ValueError: it is none of them.
        """
        name = str(model_config.get("dtype") or "fp32").removeprefix("torch.")
        dtype = SPELLINGS.get(name, name)
        if dtype not in TOLERANCE:
            raise ValueError(f"precision scheme 'plain' trains in fp64, fp32 or bf16, not {name!r} (train.dtype)")
        self.dtype = dtype

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def export(self, groups: Iterable[WeightGroup]) -> Iterator[WeightGroup]:
        """Weights in the format they are computed with: a bf16 trainer sends them rounded as its own forward does."""
        for group in groups:
            if self.dtype != "bf16":
                yield group
            else:
                yield {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in group.items()}

    def engine_options(self) -> Mapping[str, Any]:
        return {}
