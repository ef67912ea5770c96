"""FLOPs of a forward pass, against a count by hand and against torch's own."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from miles.training.flops import ForwardCost

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip


def test_a_model_by_hand():
    # a layer: queries 32 x 32, keys and values 32 x 16 each, output 32 x 32, MLP 3 x 32 x 48 = 7680 weights; head 2048
    cost = ForwardCost.of(Qwen3Config(**SMALL))
    assert cost.per_token == 2 * (3 * 7680 + 2048)
    assert cost.per_pair == 4 * 3 * 32  # two products with 32 numbers of each query
    assert cost([1, 3]) == [cost.per_token + cost.per_pair, 3 * cost.per_token + 6 * cost.per_pair]


def test_what_torch_counts():
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL), attn_implementation="eager")
    (ours,) = ForwardCost.of(model.config)([20])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(20)[None])
    every_pair = 4 * 3 * 32 * 20 * 20  # torch computes what is masked too
    assert counter.get_total_flops() == pytest.approx(ours - 4 * 3 * 32 * 210 + every_pair, rel=0.001)  # rotary besides


def test_a_token_meets_the_experts_that_it_is_sent_to():
    config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
    assert ForwardCost.of(config).per_token == 2 * (3 * (3072 + 3 * 32 * 32) + 2048)


def test_layers_whose_window_slides_count_for_their_weights():
    layers = ["full_attention", "sliding_attention", "sliding_attention"]
    config = Qwen2Config(**SMALL, layer_types=layers)
    assert ForwardCost.of(config).per_pair == 4 * 32


def test_a_model_of_another_make_is_not_guessed_at():
    class Strange:
        hidden_size = 32

    assert ForwardCost.of(Strange()) is None
