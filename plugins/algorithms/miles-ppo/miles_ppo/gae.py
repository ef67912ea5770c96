"""Generalised advantage estimation: how much better things went from a token on than a critic had expected before it.

    d_k = r_k + gamma V_{k+1} - V_k      A_k = d_k + gamma lam A_{k+1}      returns_k = A_k + V_k      arXiv:1506.02438

`k` counts the trainable tokens of one sample: what an environment said in between is part of the state that the next
of them starts from, not a step of its own. `V_k` is the value before token `k`, and 0 after the last one.
`r_k = -kl_coef KL_k`, and the last token gets the trajectory's reward on top.

Each sample ends by itself. One that hit a length limit counts as having ended there, and of siblings that were cut from
one trajectory each ends with the trajectory's reward, because nobody valued the state after its last token.

`_N` samples, `_T` tokens, `_K` trainable tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from miles.api import AdvantageInputs, Advantages, TrainError
from miles.toolkit import Episodes, discounted_sums, kl_cost
from miles_ppo.plugin import GaeOptions


def gae(inputs: AdvantageInputs, *, options: GaeOptions) -> Advantages:
    """Advantages and returns, each `[T]` float32 and 0 off the mask. Without a trainable token a reward is nobody's.

    Raises:
        TrainError: there are no values, or not finite ones.
    """
    if inputs.values_T is None:
        raise TrainError("gae compares rewards with the values of a critic, and there are none: no critic was trained")
    alone_N = torch.arange(len(inputs.rewards_N))
    episodes = Episodes.of(replace(inputs, rollout_N=alone_N))
    values_K = inputs.values_T[episodes.place_K].double()
    if not values_K.isfinite().all():
        bad = int((~values_K.isfinite()).sum())
        raise TrainError(f"{bad} of {len(values_K)} values of the critic are not finite: lower its learning rate")

    paid_K = torch.where(episodes.last_K, inputs.rewards_N.double()[episodes.sample_K], 0.0)
    rewards_K = paid_K - kl_cost(inputs)[episodes.place_K]
    next_K = torch.where(episodes.last_K, 0.0, values_K.roll(-1))
    deltas_K = rewards_K + options.gamma * next_K - values_K
    advantages_K = discounted_sums(deltas_K, episodes.episode_K, options.gamma * options.lam)

    tokens = len(inputs.mask_T)
    return Advantages(
        episodes.per_token(advantages_K.float(), tokens), episodes.per_token((advantages_K + values_K).float(), tokens)
    )
