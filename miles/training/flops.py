"""What a forward pass costs, from the dimensions of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of the forward pass: 2 for each weight that a token meets in a matrix product, and of causal attention 2
    for each number of queries and values that two tokens meet with. A backward pass costs twice as much."""

    per_token: float
    per_pair: float
    """Of two tokens of one sample, the second of which attends to the first."""

    @classmethod
    def of(cls, hf_config: Any) -> ForwardCost | None:
        """From the transformers config of a decoder; None where it lacks a dimension.

        Counted as if all layers were alike, with gated MLPs, and no more experts than a token is sent to. Layers whose
        attention is not full (`layer_types`) see so few tokens each that only their weights are counted.
        """
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        try:
            hidden, heads, layers = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
            head = getattr(text, "head_dim", None) or hidden // heads
            groups = getattr(text, "num_key_value_heads", None) or heads
            experts = getattr(text, "num_experts_per_tok", None) or 1
            wide = experts * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
            output = hidden * text.vocab_size
        except AttributeError:
            return None
        full = (getattr(text, "layer_types", None) or ["full_attention"] * layers).count("full_attention")
        weights = layers * hidden * (2 * head * (heads + groups) + 3 * wide) + output
        return cls(per_token=2.0 * weights, per_pair=4.0 * full * heads * head)

    def __call__(self, lengths: Sequence[int]) -> list[float]:
        """FLOPs of samples of these lengths, each attending to itself alone."""
        tokens_N = np.asarray(lengths, np.float64)
        return (self.per_token * tokens_N + self.per_pair * tokens_N * (tokens_N + 1) / 2).tolist()
