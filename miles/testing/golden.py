"""The random batch on which losses of verl, TRL, AReaL, SkyRL and slime were compared, and how one is measured there:
its value, the norm of its gradient, and the gradient of the first token.

    inputs = golden_batch()
    assert measured(my_loss, inputs, "token_mean") == pytest.approx((-0.0597958, 0.0534834, -0.0050203), abs=1e-7)

8 responses of 3 to 12 tokens, two groups of four, made as eight rows of 12 from `torch.manual_seed(0)` and then packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from miles.training.aggregation import LossAggregation, token_weights
from miles.types import LossInputs, PolicyLoss

ADVANTAGES = (0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75)
LENGTHS = (12, 7, 3, 9, 12, 5, 8, 10)


def golden_batch() -> LossInputs:
    """The batch, packed: every token is trainable. Log-ratios new / old have a deviation of about 0.25."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows, most = len(LENGTHS), max(LENGTHS)
        new = (torch.randn(rows, most) * 0.4 - 1.2).clamp(max=-0.01)
        old = (new + 0.25 * torch.randn(rows, most)).clamp(max=-0.01)
        rollout = (old + 0.25 * torch.randn(rows, most)).clamp(max=-0.01)
        reference = (new + 0.3 * torch.randn(rows, most)).clamp(max=-0.01)

    def packed(values: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(values, LENGTHS, strict=True)])

    bounds = [0, *accumulate(LENGTHS)]
    return LossInputs(
        log_probs_T=packed(new),
        old_log_probs_T=packed(old),
        advantages_T=packed(torch.tensor(ADVANTAGES)[:, None].expand(rows, most)),
        mask_T=torch.ones(bounds[-1]),
        bounds=bounds,
        rollout_log_probs_T=packed(rollout),
        ref_log_probs_T=packed(reference),
    )


def measured(
    loss: Callable[[LossInputs], PolicyLoss],
    inputs: LossInputs,
    aggregation: LossAggregation = "sample_mean",
    constant: float | None = None,
    factor_T: Tensor | None = None,
) -> tuple[float, float, float]:
    """Loss, L2 norm of its gradient in the new log-probs, and the first entry of that gradient.

    Args:
        factor_T: of each token's loss, such as the weights or the keep mask of a correction.
    """
    new_T = inputs.log_probs_T.detach().clone().requires_grad_()
    loss_T = loss(replace(inputs, log_probs_T=new_T)).loss_T
    weights_T = token_weights(inputs.mask_T, inputs.bounds, torch.arange(len(inputs.bounds) - 1), aggregation, constant)
    total = (loss_T * weights_T * (1.0 if factor_T is None else factor_T)).sum()
    total.backward()
    assert new_T.grad is not None, "no gradient reaches log_probs_T"
    return total.item(), new_T.grad.norm().item(), new_T.grad[0].item()
