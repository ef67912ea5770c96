"""REINFORCE++: the return that follows a token, whitened over all tokens of the batch. No critic, no group.

    r_k = -kl_coef KL_k, and r_last += R      G_k = r_k + gamma G_{k+1}      A = whiten(G)      arXiv:2501.03262

`k` counts the trainable tokens of a trajectory. What an environment said in between is no decision of the policy: it is
skipped, so it neither costs KL nor moves the reward further away.

A trajectory that was cut into siblings is one episode still: its pieces follow each other in the order in which they
stand in the batch, the return runs on from one to the next, and R is paid once, at the last trainable token of the last
piece that has one. Cutting a trajectory changes no advantage. A trajectory without a trainable token has no say.

Whitening is part of the estimator: mean 0 and variance 1 over the trainable tokens of the rollout batch, so that a
trajectory weighs there by its length. It is the only baseline, and it is the same for all prompts.

`_N` samples, `_T` tokens, `_K` trainable tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.api import AdvantageInputs
from miles.toolkit import Episodes, discounted_sums, kl_cost, whiten
from miles_reinforce_plus_plus.plugin import ReinforcePlusPlusOptions


def reinforce_plus_plus(inputs: AdvantageInputs, *, options: ReinforcePlusPlusOptions) -> Tensor:
    """Whitened discounted returns, `[T]` float32, 0 off the mask; 0 throughout where all returns agree."""
    episodes = Episodes.of(inputs)
    paid_K = torch.where(episodes.last_K, inputs.rewards_N.double()[episodes.sample_K], 0.0)
    rewards_K = paid_K - kl_cost(inputs)[episodes.place_K]
    returns_K = discounted_sums(rewards_K, episodes.episode_K, options.gamma)
    returns_T = episodes.per_token(returns_K, len(inputs.mask_T))
    return whiten(returns_T, inputs.mask_T) * inputs.mask_T
