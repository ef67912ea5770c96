"""The bridge keeps the contract of its kind."""

from miles.testing import BridgeContract
from miles.testing.tiny import hf_config


class TestLlama(BridgeContract):
    name = "llama"
    worlds = ("hf", "torch", "decoder", "megatron", "megatron_te")
    changes = {"sliding_window": None}


class TestLlamaWithBiases(BridgeContract):
    name = "llama"

    def configs(self):
        return {"biases": hf_config("llama", attention_bias=True)}
