"""Llama and Mistral. `BlockBridge` is what other families built of the same blocks start from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from miles.api import ConfigError
from miles.toolkit import OpBridge, Weight
from miles_llama.blocks import EMBED, HEAD, decoder
from miles_llama.dims import Dims
from miles_llama.megatron import megatron_config


class BlockBridge(OpBridge):
    """The `Bridge` of a family whose models are decoders of the blocks here: it only has to give their `dims`.

    Example:
        class PhiBridge(BlockBridge):
            def dims(self, hf_config):
                return Dims.of(hf_config, qkv_bias=False, o_bias=False)
    """

    @abstractmethod
    def dims(self, hf_config: Any) -> Dims:
        """The model's dimensions."""

    def weights(self, hf_config: Any) -> Sequence[Weight]:
        return decoder(self.dims(hf_config))

    def copies(self, hf_config: Any) -> Mapping[str, str]:
        return {HEAD: EMBED} if hf_config.tie_word_embeddings else {}

    def config_for(self, world: str, hf_config: Any) -> Mapping[str, Any]:
        if world == "decoder":
            return self.dims(hf_config).for_decoder()
        if world in ("megatron", "megatron_te"):
            return megatron_config(self.dims(hf_config))
        return super().config_for(world, hf_config)


class LlamaBridge(BlockBridge):
    """Llama 2 and 3, Mistral."""

    def dims(self, hf_config: Any) -> Dims:
        if getattr(hf_config, "mlp_bias", False):
            raise ConfigError("the llama bridge has no biases in MLPs: a checkpoint with mlp_bias needs its own bridge")
        bias = bool(getattr(hf_config, "attention_bias", False))
        return Dims.of(hf_config, qkv_bias=bias, o_bias=bias)
