"""How small expert choices travel, and what a replay reads of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from miles.api import (
    EngineError,
    Routing,
    compact_experts,
    expert_choices,
    experts_column,
    recorded_experts,
    routed_experts_column,
)

SIZES = [(8, "uint8", 255), (255, "uint8", 255), (256, "int16", -1), (2**15, "int16", -1), (2**15 + 1, "int32", -1)]


@pytest.mark.parametrize(("experts", "dtype", "fill"), SIZES)
def test_the_fill_is_never_an_expert(experts, dtype, fill):
    """The last expert and an unrecorded row, there and back."""
    column = routed_experts_column(2, 3, experts)
    assert (column.dtype, column.fill, column.offset, column.width) == (dtype, fill, -1, (2, 3))
    choices = np.array([[[0, 1, experts - 1]] * 2, [[-1] * 3] * 2], "int32")
    compact = compact_experts(choices, experts)
    assert compact.dtype == dtype
    assert (compact[1] == column.fill).all()
    assert recorded_experts(compact).tolist() == [True, False]
    assert experts_column(compact) == column
    wide = expert_choices(torch.from_numpy(compact))
    assert (wide.dtype, expert_choices(compact).dtype) == (torch.int32, "int32")
    np.testing.assert_array_equal(wide.numpy(), choices)
    np.testing.assert_array_equal(expert_choices(compact), choices)


@pytest.mark.parametrize("wrong", [8, -2])
def test_a_number_that_is_no_expert_is_refused(wrong):
    with pytest.raises(EngineError, match="the model has 8"):
        compact_experts(np.full((1, 2, 3), wrong, "int32"), 8)


def test_no_rows_are_compact_too():
    assert compact_experts(np.zeros((0, 2, 3), "int32"), 8).dtype == "uint8"


def test_a_models_routing():
    """Families spell it in several ways; a model of several parts keeps it in its text config."""
    qwen = transformers.Qwen3MoeConfig(num_hidden_layers=3, num_experts=6, num_experts_per_tok=2)
    assert Routing.of(qwen) == (3, 2, 6)
    deepseek = transformers.DeepseekV3Config(num_hidden_layers=5, n_routed_experts=256, num_experts_per_tok=8)
    assert Routing.of(deepseek) == (5, 8, 256)
    assert Routing.of(transformers.Qwen3Config(num_hidden_layers=2)) is None
    text = SimpleNamespace(num_hidden_layers=4, moe_num_experts=64, moe_k=6)
    assert Routing.of(SimpleNamespace(get_text_config=lambda: text)) == (4, 6, 64)
