"""Dimensions as Megatron-Core 0.16 spells them."""

from __future__ import annotations

from typing import Any

from torch.nn.functional import silu

from miles.api import ConfigError
from miles_llama.dims import Dims

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core's `rope_scaling` has built in; only the factor is an argument."""


def megatron_config(d: Dims) -> dict[str, Any]:
    """Keyword arguments of `TransformerConfig` under `transformer`, and of `GPTModel` under `model`.

    Raises:
        ConfigError: Megatron-Core has no such part.
    """
    if d.o_bias:
        raise ConfigError("Megatron-Core has no bias on the attention's output alone (attention_bias)")
    if d.sliding_window is not None:
        raise ConfigError("sliding-window attention is not carried over to Megatron-Core")
    if d.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"only silu is carried over to Megatron-Core, not {d.hidden_act!r}")
    transformer: dict[str, Any] = {
        "num_layers": d.num_layers,
        "hidden_size": d.hidden_size,
        "num_attention_heads": d.num_heads,
        "num_query_groups": d.num_kv_heads,
        "kv_channels": d.head_dim,
        "ffn_hidden_size": d.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": d.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": d.qkv_bias,
        "qk_layernorm": d.qk_norm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if d.sparse:
        transformer |= _experts(d)
    model = {
        "vocab_size": d.vocab_size,
        "max_sequence_length": d.max_position_embeddings,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": d.tie_word_embeddings,
        **_rope(d.rope_parameters),
    }
    return {"transformer": transformer, "model": model}


def _experts(d: Dims) -> dict[str, Any]:
    return {
        "num_moe_experts": d.num_experts,
        "moe_layer_freq": [int(moe) for moe in d.moe_layers],
        "moe_ffn_hidden_size": d.moe_intermediate_size,
        "moe_router_topk": d.top_k_experts,
        # Softmax over all experts and then scaling the chosen ones to 1 is softmax over the chosen ones.
        "moe_router_pre_softmax": not d.norm_topk_prob,
        "moe_router_score_function": "softmax",
        "moe_shared_expert_intermediate_size": d.shared_intermediate_size or None,
        "moe_shared_expert_gate": bool(d.shared_intermediate_size),
    }


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    base = {"rotary_base": rope["rope_theta"]}
    if kind == "default":
        return base
    if kind == "linear":
        return {**base, "seq_len_interpolation_factor": rope["factor"]}
    if kind == "llama3" and all(rope[key] == value for key, value in LLAMA3_SCALING.items()):
        return {**base, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise ConfigError(f"rotary embedding {rope} is not one that Megatron-Core's GPTModel takes as arguments")
