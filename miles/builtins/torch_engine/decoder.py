"""The engine's own decoder: one pre-norm transformer for the Llama and Qwen families, dense and mixture-of-experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderConfig:
    """A model's dimensions under the names of the `decoder` world: what `Bridge.config_for("decoder", ...)` returns."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    """As in a Hugging Face config: `rope_type`, `rope_theta` and what its scaling needs."""
    max_position_embeddings: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """RMS norm of every query and key head before the rotary embedding."""
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    """Keys a sliding layer sees, itself included."""
    layer_types: tuple[str, ...] | None = None
    """`full_attention` or `sliding_attention` for each layer; None: all slide if there is a window."""
    num_experts: int = 0
    """0 for a dense model."""
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    """Whether the chosen experts' probabilities are renormalised to sum to 1."""
    shared_intermediate_size: int = 0
    """Width of the shared expert; 0 when there is none."""
    moe_layers: tuple[bool, ...] = ()
    """For each layer whether its MLP is a mixture of experts; empty: none is."""
