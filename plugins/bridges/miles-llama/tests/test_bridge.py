"""Random Llama and Mistral models, saved by transformers and converted to every world and back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from miles_llama.bridge import LlamaBridge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from miles.api import ConfigError
from miles.builtins.torch_engine.decoder import DecoderConfig, weight_shapes
from miles.checkpoint_io import read_weights

DIMS = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**DIMS),
    "llama_tied": lambda: LlamaConfig(**DIMS, tie_word_embeddings=True, rope_parameters=dict(LLAMA3)),
    "llama_bias": lambda: LlamaConfig(**DIMS, attention_bias=True),
    "mistral": lambda: MistralConfig(**DIMS, head_dim=8, sliding_window=16),
}


def merged(groups):
    together: dict[str, torch.Tensor] = {}
    for group in groups:
        together |= group
    return together


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("world", ["hf", "torch", "decoder", "megatron", "megatron_te"])
def test_round_trip(saved, world):
    model, folder = saved
    there = merged(LlamaBridge().to_world(world, model.config, read_weights(folder)))
    backwards = [{name: tensor} for name, tensor in reversed(there.items())]
    checkpoint = load_file(folder / "model.safetensors")
    assert same(merged(LlamaBridge().from_world(world, model.config, backwards)), checkpoint)


def test_the_engine_takes_names_and_shapes(saved):
    model, folder = saved
    options = DecoderConfig(**LlamaBridge().config_for("decoder", model.config))
    tensors = merged(LlamaBridge().to_world("decoder", model.config, read_weights(folder)))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == weight_shapes(options)


def test_decoder_dimensions():
    llama = LlamaBridge().config_for("decoder", CONFIGS["llama_tied"]())
    assert llama["rope_parameters"] == LLAMA3
    assert (llama["head_dim"], llama["sliding_window"], llama["qkv_bias"]) == (4, None, False)
    assert llama["layer_types"] == ("full_attention",) * 2
    biased = LlamaBridge().config_for("decoder", CONFIGS["llama_bias"]())
    assert biased["qkv_bias"]
    assert biased["o_bias"]
    mistral = LlamaBridge().config_for("decoder", CONFIGS["mistral"]())
    assert (mistral["head_dim"], mistral["sliding_window"]) == (8, 16)
    assert mistral["layer_types"] == ("sliding_attention",) * 2


def test_megatron_dimensions():
    options = LlamaBridge().config_for("megatron", CONFIGS["llama_tied"]())
    assert options["model"]["rope_scaling"]
    assert options["model"]["rope_scaling_factor"] == 8.0
    assert options["model"]["share_embeddings_and_output_weights"]
    assert options["transformer"]["num_query_groups"] == 2
    with pytest.raises(ConfigError, match="sliding-window"):
        LlamaBridge().config_for("megatron", CONFIGS["mistral"]())
    yarn = LlamaConfig(**DIMS, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ConfigError, match="yarn"):
        LlamaBridge().config_for("megatron", yarn)


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="mlp_bias"):
        LlamaBridge().config_for("decoder", LlamaConfig(**DIMS, mlp_bias=True))
    with pytest.raises(ConfigError, match="'jax'"):
        LlamaBridge().config_for("jax", CONFIGS["llama"]())
