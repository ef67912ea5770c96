"""Batches as the core hands them to components: a rollout batch for estimators and corrections, a packed micro-batch
for losses. Small, irregular, and drawn from a seed: groups of unequal size, samples of unequal length, environment
tokens between the model's, one sample without a trainable token.

`_N` samples, `_T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from miles.types import AdvantageInputs, LossInputs

Inputs = TypeVar("Inputs", AdvantageInputs, LossInputs)
PROMPT = 2
"""Tokens of each sample before its response: their mask is 0."""


def rollout_batch(
    rewards: Sequence[float] = (1.0, 0.0, 0.5, 1.0, 1.0, 0.25, 0.0),
    groups: Sequence[int] = (4, 4, 4, 9, 9, 2, 2),
    responses: Sequence[int] = (3, 5, 1, 4, 2, 6, 0),
    seed: int = 0,
) -> AdvantageInputs:
    """A rollout batch with every optional field present.

    Args:
        rewards: of each sample.
        groups: number of each sample's prompt.
        responses: tokens of each response; every fourth of them is the environment's.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, *accumulate(PROMPT + length for length in responses)]
    masks = [[0.0] * PROMPT + [float(t % 4 != 3) for t in range(length)] for length in responses]
    mask_T = torch.tensor([value for mask in masks for value in mask])

    def log_probs() -> Tensor:
        return -torch.rand(bounds[-1], generator=generator) * 3 * mask_T

    count, old_T = len(rewards), log_probs()
    return AdvantageInputs(
        rewards_N=torch.tensor(rewards, dtype=torch.float64),
        mask_T=mask_T,
        bounds=bounds,
        group_N=torch.tensor(groups, dtype=torch.int64),
        rollout_N=torch.arange(100, 100 + count),
        old_log_probs_T=old_T,
        ref_log_probs_T=log_probs(),
        rollout_log_probs_T=old_T + 0.1 * torch.randn(bounds[-1], generator=generator) * mask_T,
        teacher_log_probs_T=log_probs(),
        values_T=torch.rand(bounds[-1], generator=generator) * mask_T,
        kl_T=torch.rand(bounds[-1], generator=generator) * mask_T,
        kl_coef=0.1,
        baseline_rewards_N=torch.tensor(groups, dtype=torch.float64) / 10,
    )


def loss_batch(responses: Sequence[int] = (3, 5, 1, 4), seed: int = 0) -> LossInputs:
    """A micro-batch whose log-probabilities carry a gradient, a little off the old ones; advantages of either sign."""
    batch = rollout_batch([0.0] * len(responses), list(range(len(responses))), responses, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = batch.bounds[-1]
    assert batch.old_log_probs_T is not None
    shift_T = 0.1 * torch.randn(tokens, generator=generator)
    return LossInputs(
        log_probs_T=(batch.old_log_probs_T + shift_T).requires_grad_(),
        old_log_probs_T=batch.old_log_probs_T,
        advantages_T=torch.randn(tokens, generator=generator) * batch.mask_T,
        mask_T=batch.mask_T,
        bounds=batch.bounds,
        entropy_T=torch.rand(tokens, generator=generator).requires_grad_(),
        rollout_log_probs_T=batch.rollout_log_probs_T,
        ref_log_probs_T=batch.ref_log_probs_T,
        teacher_log_probs_T=batch.teacher_log_probs_T,
        tokens_T=torch.randint(0, 50, (tokens,), generator=generator),
    )


def select(inputs: Inputs, order: Sequence[int]) -> Inputs:
    """The batch of these samples, in this order; every column follows its samples."""
    tokens = [t for i in order for t in range(inputs.bounds[i], inputs.bounds[i + 1])]
    changes: dict[str, Any] = {}
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor) and field.name.endswith(("_T", "_N")):
            changes[field.name] = value.detach()[list(order) if field.name.endswith("_N") else tokens]
    changes["bounds"] = [0, *accumulate(inputs.bounds[i + 1] - inputs.bounds[i] for i in order)]
    return replace(inputs, **changes)


def padded(inputs: LossInputs, pad: int = 3) -> LossInputs:
    """The same micro-batch with `pad` tokens behind its last sample, as some backends make their lengths even."""
    changes: dict[str, Any] = {}
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = functional.pad(value.detach(), (0, pad))
    return replace(inputs, **changes)


def cut_in_two(inputs: AdvantageInputs, sample: int, at: int) -> AdvantageInputs:
    """The same batch with one trajectory cut into two siblings before its token `at`; no column changes."""
    twice = [i for i in range(len(inputs.rewards_N)) for _ in range(2 if i == sample else 1)]
    changes = {f.name: getattr(inputs, f.name)[twice] for f in fields(inputs) if f.name.endswith("_N")}
    return replace(inputs, **changes, bounds=sorted([*inputs.bounds, inputs.bounds[sample] + at]))


def copied(inputs: Inputs) -> Inputs:
    """The same numbers in tensors of their own."""
    values: dict[str, Any] = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    copies: dict[str, Any] = {n: v.detach().clone() for n, v in values.items() if isinstance(v, Tensor)}
    return replace(inputs, **copies)


def unchanged(before: Inputs, after: Inputs) -> bool:
    """Whether every tensor of two batches is the same, bit for bit."""
    pairs = [(getattr(before, f.name), getattr(after, f.name)) for f in fields(before)]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
