"""A step of the trainer is to seven digits what verl, TRL and AReaL compute on the same numbers."""

import pytest
import torch
from golden import ADVANTAGES, STEPS
from onestep import golden_batch, one_step


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    row = STEPS[name]
    assert one_step(golden_batch(), **row.algorithm).numbers == pytest.approx(row.numbers, abs=5e-8)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name):
    batch = golden_batch()
    step = one_step(batch, given=False, advantage_estimator=name)
    expected_BS = torch.tensor(ADVANTAGES[name])[:, None] * batch.mask_BS
    torch.testing.assert_close(step.advantages_BS, expected_BS, atol=5e-7, rtol=0)
