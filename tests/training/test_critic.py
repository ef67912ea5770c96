"""A critic's loss by hand, and how much of the returns it knows."""

import pytest
import torch

from miles.training.critic import ValueObjective, explained_variance, value_loss
from miles.types import MicroBatch, Outputs


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 3.0, -1.0])
    loss, clipped = value_loss(values, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 4.0, -0.5]), clip=0.5)
    # 1: (1 - 2)^2 / 2.  2: moved by 2, allowed 0.5: max((1.5 - 4)^2, (3 - 4)^2) / 2.  3: max((-.5 + .5)^2, .5^2) / 2
    assert loss.tolist() == pytest.approx([0.5, 3.125, 0.125])
    assert clipped.tolist() == [0, 1, 0]
    free, none = value_loss(values, torch.zeros(3), torch.tensor([2.0, 4.0, -0.5]), clip=None)
    assert free.tolist() == pytest.approx([0.5, 0.5, 0.125])
    assert none.tolist() == [0, 0, 0]


def test_rounding_clips_nothing():
    old, moves, returns = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    loss, clipped = value_loss(old + (moves - 0.5), old, 3 * returns, clip=0.6)
    assert not clipped.any()
    assert torch.equal(loss, (old + (moves - 0.5) - 3 * returns).square() / 2)


def test_a_move_that_is_clipped_has_no_gradient():
    values = torch.tensor([3.0, 1.2], requires_grad=True)
    value_loss(values, torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0]), clip=0.5)[0].sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, 1.2 - 4])


def test_the_objective_weighs_tokens_as_the_driver_says():
    batch = MicroBatch(
        torch.zeros(4, dtype=torch.int64), torch.arange(4), [0, 4], [7],
        {
            "mask": torch.tensor([0.0, 1, 1, 0]), "weights": torch.tensor([0.0, 0.25, 0.25, 0]),
            "values": torch.zeros(4), "returns": torch.tensor([0.0, 1.0, 2.0, 9.0]),
        },
    )  # fmt: skip
    objective = ValueObjective(clip=None)
    objective.tokens = 4.0
    values = torch.zeros(4, requires_grad=True)
    result = objective(batch, Outputs(values_T=values))
    assert float(result.loss.detach()) == pytest.approx(0.25 * 0.5 + 0.25 * 2)
    assert float(result.sums["critic/value_loss"]) == pytest.approx(0.625)
    result.loss.backward()
    assert values.grad.tolist() == pytest.approx([0, -0.25, -0.5, 0])


def test_explained_variance():
    mask, returns = torch.tensor([1.0, 1, 0, 1]), torch.tensor([1.0, 2.0, 99.0, 3.0])
    assert explained_variance(returns.clone(), returns, mask) == 1
    assert explained_variance(torch.full((4,), 2.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)  # errors are twice as wide
    assert explained_variance(returns, torch.ones(4), mask) == 0
    assert explained_variance(returns, returns, torch.zeros(4)) == 0
