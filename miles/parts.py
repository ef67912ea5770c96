"""How a model's weights are divided among ranks: what one rank holds, and how one tensor is cut. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Which of `size` equal pieces: tensor parallelism cuts each matrix into as many."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Part:
    """What one rank holds of a model's weights; the default is all of them. Layers and experts count globally."""

    layers: range | None = None
    """Of this pipeline stage, or virtual stage. Their names within the part start at 0."""
    experts: range | None = None
    """Of this expert-parallel rank. Their names within the part start at 0."""
    tensor: Share = Share()
    expert_tensor: Share = Share()
    """Tensor parallelism within an expert, which may differ from that of the other matrices."""
    vocab_rows: int | None = None
    """Rows of embedding and head where the vocabulary is padded: with zeros, which are cut off on the way back."""


WHOLE = Part()
"""A model that is not divided."""


@dataclass(frozen=True)
class Sharding:
    """How tensor parallelism divides one checkpoint tensor. See `miles.toolkit.join_shards`."""

    dim: int | None = None
    """None: every rank holds all of it."""
    expert: bool = False
    """It belongs to an expert, so `Part.expert_tensor` divides it, not `Part.tensor`."""
    rows: int | None = None
    """Rows without padding, of a tensor whose rows may be padded."""
