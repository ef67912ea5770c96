"""Qwen2 and Qwen3: Llama's blocks with biases (2) or head norms (3), and mixtures of experts."""

from __future__ import annotations

from typing import Any

from miles_llama.bridge import BlockBridge
from miles_llama.dims import Dims


class QwenBridge(BlockBridge):
    """qwen2, qwen3, qwen2_moe (with a shared expert) and qwen3_moe."""

    def dims(self, hf_config: Any) -> Dims:
        third = hf_config.model_type.startswith("qwen3")
        bias = bool(getattr(hf_config, "attention_bias", False))
        return Dims.of(
            hf_config,
            qkv_bias=bias if third else bool(getattr(hf_config, "qkv_bias", True)),
            o_bias=bias if third else False,
            qk_norm=third,
            moe_layers=moe_layers(hf_config) if hf_config.model_type.endswith("_moe") else None,
        )


def moe_layers(hf_config: Any) -> tuple[bool, ...]:
    """Of each layer, whether it is a mixture: every `decoder_sparse_step`th one that is not named as dense."""
    return tuple(
        hf_config.num_experts > 0
        and i not in hf_config.mlp_only_layers
        and (i + 1) % hf_config.decoder_sparse_step == 0
        for i in range(hf_config.num_hidden_layers)
    )
