"""How memory is divided into slots."""

from __future__ import annotations

import pytest
import torch

from miles.builtins.torch_engine.budget import Budget
from miles.builtins.torch_engine.decoder import DecoderConfig
from miles.builtins.torch_engine.kv_cache import KVCache
from miles.builtins.torch_engine.options import TorchEngineOptions
from miles.errors import ConfigError

CONFIG = DecoderConfig(
    vocab_size=10, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=8,
    rms_norm_eps=1e-6, rope_parameters={"rope_theta": 1e4}, max_position_embeddings=1000,
)  # fmt: skip


def budget(**options):
    return Budget.of(TorchEngineOptions(**options), CONFIG, torch.device("cpu"), torch.float32)


def test_a_token_takes_its_keys_and_values():
    assert KVCache.bytes_per_token(CONFIG, torch.float32) == 3 * 2 * 2 * 4 * 4
    assert KVCache.bytes_per_token(CONFIG, torch.bfloat16) == 3 * 2 * 2 * 4 * 2


def test_options_decide_where_they_speak():
    made = budget(kv_cache_tokens=300, prefix_cache_tokens=50, max_len=200, max_running=4)
    assert (made.kv_tokens, made.prefix_tokens, made.max_len, made.max_running) == (300, 50, 200, 4)


def test_sequences_are_no_longer_than_model_and_memory_allow():
    assert budget(max_len=5000).max_len == 1000
    assert budget(kv_cache_tokens=300).max_len == 300


def test_unlimited_memory_is_not_claimed():
    made = budget(max_running=2)
    assert made.kv_tokens + made.prefix_tokens <= 2 * 2 * 1000


@pytest.mark.parametrize(
    ("slots", "length", "wished", "expected"),
    [
        (1, 5, 20, (16, 64)),  # never less than the smallest
        (40, 5, 100, (64, 128)),  # doubled until they fit
        (100, 5, 100, (100, 128)),  # at most max_running
        (100, 5, 900, (100, 64)),  # too much to take before it is needed
        (100, 300, 900, (39, 512)),  # as many as there is memory for
        (100, 900, 990, (20, 1000)),  # no longer than the longest sequence
    ],
)
def test_geometry(slots, length, wished, expected):
    made = budget(kv_cache_tokens=20000, max_running=100)
    assert made.geometry(slots, length, wished) == expected


def test_one_sequence_always_fits():
    assert budget(kv_cache_tokens=100).geometry(8, 90, 90) == (1, 100)


@pytest.mark.parametrize(
    "options",
    [{"max_running": 0}, {"max_len": 1}, {"kv_cache_tokens": 1}, {"prefix_cache_tokens": -1}, {"memory_fraction": 0.0}],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TorchEngineOptions(**options)
