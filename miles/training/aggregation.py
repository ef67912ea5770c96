"""From per-token losses to one number, as a weight for every token.

Each way of averaging is a weighted sum over the trainable tokens of one optimizer step, with weights that depend on
masks alone. The driver computes the weights once, globally, and sends them along with the tokens; a rank then only
sums `weight * loss`. So the result cannot depend on micro-batches, packing, ranks or the order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossAggregation = Literal["sample_mean", "token_mean", "constant", "sequence_sum"]


def sample_index(bounds: Sequence[int]) -> Tensor:
    """`[T]` int64: which sample each token belongs to."""
    lengths = torch.tensor([end - start for start, end in pairwise(bounds)], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def sum_per_sample(values_T: Tensor, bounds: Sequence[int]) -> Tensor:
    """`[N]`: sum of each sample's tokens, in the dtype of `values_T`; a pad beyond the last sample is left out.
    Differentiable."""
    index_T = sample_index(bounds).to(values_T.device, non_blocking=True)
    return values_T.new_zeros(len(bounds) - 1).index_add(0, index_T, values_T[: bounds[-1]])


def mean_per_sample(values_T: Tensor, mask_T: Tensor, bounds: Sequence[int]) -> Tensor:
    """`[N]`: mean over each sample's trainable tokens, 0 for a sample without. Differentiable."""
    total_N = sum_per_sample(torch.where(mask_T != 0, values_T * mask_T, 0.0), bounds)
    return total_N / sum_per_sample(mask_T, bounds).clamp(min=1)


def spread_over_samples(values_N: Tensor, bounds: Sequence[int], tokens: int) -> Tensor:
    """`[tokens]`: each sample's value on all of its tokens, 0 on a pad beyond the last sample. Differentiable."""
    values_T = values_N[sample_index(bounds).to(values_N.device, non_blocking=True)]
    return functional.pad(values_T, (0, tokens - bounds[-1]))


def token_weights(
    mask_T: Tensor,
    bounds: Sequence[int],
    rollout_N: Tensor,
    aggregation: LossAggregation,
    constant: float | None = None,
) -> Tensor:
    """Weights `[T]` (float32, 0 off the mask) for the samples of one optimizer step.

    With `m` the mask, `N` the number of rollouts in the step and `D` a rollout's trainable tokens over all siblings
    that were cut from it (equal numbers in `rollout_N`):

    - `sample_mean`: `m / (D N)`: every rollout counts the same (GRPO).
    - `token_mean`: `m / sum(m)`: every token counts the same (DAPO).
    - `constant`: `m / (constant N)`: a rollout's weight grows with its length (Dr. GRPO, arXiv:2503.20783).
    - `sequence_sum`: `m / N`.
    """
    mask_T = mask_T.double()
    rollouts, row_N = torch.unique(rollout_N, return_inverse=True)
    count = max(len(rollouts), 1)
    if aggregation == "token_mean":
        weights_T = mask_T / mask_T.sum().clamp(min=1)
    elif aggregation == "sequence_sum":
        weights_T = mask_T / count
    elif aggregation == "constant":
        if constant is None:
            raise ValueError("loss_aggregation 'constant' needs its constant")
        weights_T = mask_T / (constant * count)
    else:
        tokens_N = sum_per_sample(mask_T, bounds)
        tokens_R = mask_T.new_zeros(len(rollouts)).index_add(0, row_N, tokens_N)
        weights_T = mask_T / (tokens_R.clamp(min=1) * count)[row_N][sample_index(bounds)]
    return weights_T.float()
