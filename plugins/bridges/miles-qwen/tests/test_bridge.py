"""Random Qwen models, saved by transformers and converted to every world and back, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miles_qwen.bridge import QwenBridge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from miles.api import ConfigError, Part, Share, WeightError
from miles.builtins.torch_engine.decoder import DecoderConfig, weight_shapes
from miles.checkpoint_io import read_weights
from miles.toolkit import join_shards

WORLDS = ("hf", "torch", "decoder", "megatron", "megatron_te")
DENSE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
CONFIGS = {
    "qwen2": lambda tied: Qwen2Config(**DENSE, tie_word_embeddings=tied),
    "qwen3": lambda tied: Qwen3Config(**DENSE, head_dim=8, tie_word_embeddings=tied),
    "qwen3_bias": lambda tied: Qwen3Config(**DENSE, head_dim=8, attention_bias=True, tie_word_embeddings=tied),
    "qwen2_moe": lambda tied: Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=12, tie_word_embeddings=tied),
    "qwen3_moe": lambda tied: Qwen3MoeConfig(**MOE, head_dim=8, tie_word_embeddings=tied),
}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module", params=[(name, tied) for name in CONFIGS for tied in (False, True)], ids=str)
def saved(request, tmp_path_factory):
    """A model, its config, and its checkpoint as transformers writes it."""
    name, tied = request.param
    model = random_model(CONFIGS[name](tied))
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return model, model.config, folder


def singly(tensors, seed=0):
    items = list(tensors.items())
    random.Random(seed).shuffle(items)
    return [{name: tensor} for name, tensor in items]


def merged(groups):
    together: dict[str, torch.Tensor] = {}
    for group in groups:
        assert not together.keys() & group.keys()
        together |= group
    return together


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_module_without_its_tied_name_exports_the_same(saved):
    """`named_parameters` has each tensor once, `state_dict` both names of a tied one."""
    model, config, folder = saved
    checkpoint = load_file(folder / "model.safetensors")
    for tensors in (dict(model.named_parameters()), model.state_dict()):
        assert same(merged(QwenBridge().from_world("torch", config, singly(tensors))), checkpoint)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), world=st.sampled_from(WORLDS))
def test_round_trip_whatever_the_order(saved, seed, world):
    _, config, folder = saved
    checkpoint = load_file(folder / "model.safetensors")
    there = merged(QwenBridge().to_world(world, config, singly(checkpoint, seed)))
    assert same(merged(QwenBridge().from_world(world, config, singly(there, seed + 1))), checkpoint)


def test_sharded_checkpoints_read_the_same(saved, tmp_path):
    model, config, folder = saved
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole = merged(QwenBridge().to_world("decoder", config, read_weights(folder)))
    assert same(merged(QwenBridge().to_world("decoder", config, read_weights(tmp_path))), whole)


def test_decoder_tensors_are_laid_out_as_the_engine_reads_them(saved):
    _, config, folder = saved
    hf = load_file(folder / "model.safetensors")
    decoder = merged(QwenBridge().to_world("decoder", config, read_weights(folder)))
    attention = "model.layers.2.self_attn."
    qkv = [hf[attention + f"{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(decoder["layers.2.qkv.weight"], torch.cat(qkv))
    assert ("lm_head.weight" in decoder) == (not config.tie_word_embeddings)
    assert torch.equal(decoder["layers.1.gate_up.weight"][:24], hf["model.layers.1.mlp.gate_proj.weight"])
    if config.model_type.endswith("_moe"):
        expert = hf["model.layers.0.mlp.experts.3.up_proj.weight"]
        assert decoder["layers.0.experts.gate_up"].shape == (4, 16, 16)
        assert torch.equal(decoder["layers.0.experts.gate_up"][3, 8:], expert)


@pytest.mark.parametrize("world", ["megatron", "megatron_te"])
@pytest.mark.parametrize("stages", [1, 3])
def test_megatron_parts_together_are_the_whole(saved, world, stages):
    """Tensor and expert parallel over two ranks each, with and without pipeline stages, a padded vocabulary."""
    _, config, folder = saved
    bridge, checkpoint = QwenBridge(), load_file(folder / "model.safetensors")
    shards: dict[str, list[torch.Tensor]] = {}
    for stage in range(stages):
        for expert_rank in range(2):
            for rank in range(2):
                share = Share(rank, 2)
                layers = range(stage * 3 // stages, (stage + 1) * 3 // stages)
                experts = range(2 * expert_rank, 2 * expert_rank + 2)
                part = Part(layers, experts, share, share, vocab_rows=64)
                there = merged(bridge.to_world(world, config, singly(checkpoint), part))
                own_head = stages > 1 or not config.tie_word_embeddings
                assert ("output_layer.weight" in there) == (stage == stages - 1 and own_head)
                for name, tensor in merged(bridge.from_world(world, config, singly(there), part)).items():
                    if expert_rank == 0 or ".experts." in name:
                        shards.setdefault(name, []).append(tensor)
    assert same(
        {name: join_shards(pieces, bridge.sharding(config, name)) for name, pieces in shards.items()}, checkpoint
    )


def test_a_redundant_tied_head_is_left_out():
    config = CONFIGS["qwen3"](True)
    model = random_model(config)
    tensors = dict(model.state_dict())
    assert "lm_head.weight" in tensors
    assert "lm_head.weight" not in merged(QwenBridge().to_world("decoder", config, singly(tensors)))
    torch_world = merged(QwenBridge().to_world("torch", config, singly(tensors)))
    assert torch_world["lm_head.weight"] is torch_world["model.embed_tokens.weight"]
    with pytest.raises(WeightError, match="set tie_word_embeddings to false"):
        list(QwenBridge().to_world("torch", config, singly(tensors | {"lm_head.weight": torch.zeros(48, 16)})))


def test_missing_and_foreign_tensors_are_named(saved):
    _, config, folder = saved
    tensors = load_file(folder / "model.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    with pytest.raises(WeightError, match=r"1 tensors are missing .*model\.layers\.1\.self_attn\.k_proj\.weight"):
        list(QwenBridge().to_world("decoder", config, singly(lost)))
    foreign = tensors | {"model.layers.1.self_attn.q_proj.weight_scale_inv": torch.zeros(1)}
    with pytest.raises(WeightError, match="unknown tensor .*weight_scale_inv"):
        list(QwenBridge().to_world("decoder", config, singly(foreign)))


def test_the_engine_takes_names_and_shapes(saved):
    _, config, folder = saved
    options = DecoderConfig(**QwenBridge().config_for("decoder", config))
    tensors = merged(QwenBridge().to_world("decoder", config, read_weights(folder)))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == weight_shapes(options)


def test_decoder_dimensions():
    config = QwenBridge().config_for("decoder", CONFIGS["qwen2_moe"](False))
    assert config["qkv_bias"]
    assert not config["o_bias"]
    assert not config["qk_norm"]
    assert config["moe_layers"] == (True, False, True)
    assert config["head_dim"] == 4
    assert (config["num_experts"], config["top_k_experts"], config["shared_intermediate_size"]) == (4, 2, 12)
    assert config["sliding_window"] is None
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    dense = QwenBridge().config_for("decoder", CONFIGS["qwen3"](True))
    assert dense["qk_norm"]
    assert not dense["qkv_bias"]
    assert dense["tie_word_embeddings"]
    assert (dense["num_experts"], dense["head_dim"]) == (0, 8)


def test_sliding_layers_are_carried_over():
    config = Qwen2Config(**DENSE, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    options = QwenBridge().config_for("decoder", config)
    assert options["sliding_window"] == 8
    assert options["layer_types"] == ("full_attention", "full_attention", "sliding_attention")


def test_megatron_refuses_what_it_has_not():
    with pytest.raises(ConfigError, match="attention_bias"):
        QwenBridge().config_for("megatron", CONFIGS["qwen3_bias"](False))
