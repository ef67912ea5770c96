"""Sums whose bits do not depend on their order. On several ranks: tests/seams/test_fsdp2.py."""

import pytest
import torch
from torch import nn

from miles.builtins.fsdp.exact_sums import ExactSums
from miles.builtins.fsdp.optimizer import Optimizer
from miles.config.optimizer import OptimizerSection
from miles.errors import TrainError

GRADIENTS = [2.0**24, 1.0, 1.0, -(2.0**24), 1.0]
"""In float32, 2^24 + 1 is 2^24: added in this order they give 1 instead of 3."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_rounded_once(dtype):
    found = []
    for sums in (None, ExactSums()):
        parameter = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = Optimizer({"p": parameter}, OptimizerSection(), total_steps=1, sums=sums)
        for _ in range(2):
            optimizer.zero_grad()
            for gradient in GRADIENTS:
                (parameter * gradient).sum().backward()
            optimizer.measure()
        found.append(optimizer.masters["p"].grad)
    assert [gradient.tolist() for gradient in found] == [[1.0] * 3, [3.0] * 3]
    assert found[1].dtype == torch.float32


def test_the_norm_is_one_of_float64():
    """4,097 ones and a 2^12: in float32 the squares end at 2^24 + 4096, or at less."""
    parameter = nn.Parameter(torch.zeros(4098))
    parameter.grad = torch.ones(4098)
    parameter.grad[0] = 2.0**12
    optimizer = Optimizer({"p": parameter}, OptimizerSection(clip_grad=0.0), total_steps=1)
    assert float(optimizer.measure()) == pytest.approx(2.0**24 + 4097, rel=1e-15)
    assert optimizer.step(torch.zeros(())).grad_norm == pytest.approx((2.0**24 + 4097) ** 0.5, rel=1e-15)


def test_a_gradient_that_comes_and_goes_is_refused():
    sums = ExactSums()
    sums.add("unit", torch.ones(4))
    with pytest.raises(TrainError, match="in others has none"):
        sums.add("unit", torch.ones(3))
