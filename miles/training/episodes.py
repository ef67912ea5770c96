"""Time within trajectories, for estimators of discounted sums: rewards, values and KL, from one action to the next.

An action is a trainable token. What the environment said in between is no step of the policy: it is skipped, and costs
neither discount nor KL.

`_N` samples, `_T` tokens, `_K` actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.training.aggregation import sample_index
from miles.types import AdvantageInputs


@dataclass(frozen=True)
class Episodes:
    """The actions of a rollout batch, trajectory after trajectory, those of each in the order of time.

    Samples cut from one trajectory are pieces of one episode, in the order in which they stand in the batch: that in
    which the generate function returned them. The last action of an episode is the last of the last piece that has one.
    A trajectory without an action is no episode.
    """

    place_K: Tensor
    """int64: where in the batch an action stands, an index into `[T]`."""
    sample_K: Tensor
    """int64: the sample it belongs to, an index into `[N]`."""
    episode_K: Tensor
    """int64: which episode it belongs to; those of one stand together."""
    last_K: Tensor
    """bool: nothing follows in its episode."""

    @classmethod
    def of(cls, inputs: AdvantageInputs) -> Episodes:
        place_K = inputs.mask_T.nonzero()[:, 0]
        sample_K = sample_index(inputs.bounds)[place_K]
        episode_K = torch.unique(inputs.rollout_N, return_inverse=True)[1][sample_K]
        episode_K, order_K = episode_K.sort(stable=True)
        last_K = torch.ones_like(order_K, dtype=torch.bool)
        last_K[:-1] = episode_K.diff() != 0
        return cls(place_K[order_K], sample_K[order_K], episode_K, last_K)

    def per_token(self, values_K: Tensor, tokens: int) -> Tensor:
        """`[tokens]`: each action's value in its place, 0 on tokens that are no action."""
        return values_K.new_zeros(tokens).index_copy(0, self.place_K, values_K)


def discounted_sums(values_K: Tensor, episode_K: Tensor, factor: float) -> Tensor:
    """`S_k = x_k + factor * S_{k+1}` in each episode, `[K]`, float64; what follows its end is 0.

    In as many passes over the batch as the longest episode's length has binary digits: once `S_k` has the first `w`
    terms, adding `factor^w * S_{k+w}` makes them `2 w`. A sum depends on the terms of its own episode alone.

    Args:
        episode_K: which episode a value belongs to; those of one stand together.
        factor: from 0 to 1.
    """
    sums_K = values_K.double().clone()
    longest = int(episode_K.unique_consecutive(return_counts=True)[1].max()) if len(episode_K) else 0
    width = 1
    while width < longest:
        together_K = episode_K[width:] == episode_K[:-width]
        sums_K[:-width] += torch.where(together_K, factor**width * sums_K[width:], 0.0)
        width *= 2
    return sums_K


def kl_cost(inputs: AdvantageInputs) -> Tensor:
    """`kl_coef * kl_t` on trainable tokens and 0 elsewhere: `[T]`, float64. For components with the need `kl`."""
    if not inputs.kl_coef:
        return torch.zeros_like(inputs.mask_T, dtype=torch.float64)
    assert inputs.kl_T is not None
    return torch.where(inputs.mask_T > 0, inputs.kl_coef * inputs.kl_T.double(), 0.0)
