"""REINFORCE with the greedy response as the baseline: how much better a trajectory did than the policy's best guess.

    A = R - R_greedy     arXiv:2310.10505

`R_greedy` is the reward of one rollout of the same prompt at temperature 0, which the core generates beside the samples
and never trains on (`Group.baseline`). It does not depend on the sampled tokens, so the policy gradient stays unbiased,
and it needs no other samples of the prompt: a group of one has advantages too.

`_N` samples, `_T` tokens.
"""

from __future__ import annotations

from torch import Tensor

from miles.api import AdvantageInputs, TrainError
from miles.toolkit import per_token


def remax(inputs: AdvantageInputs) -> Tensor:
    """`R - R_greedy`, `[T]`, the same on every trainable token of a sample.

    Raises:
        TrainError: the groups of the batch came without a baseline reward.
    """
    if inputs.baseline_rewards_N is None:
        raise TrainError(
            "the batch has no baseline rewards (Group.baseline_reward): groups that a plugin makes need the reward of "
            "a greedy rollout, as those of the producer have it"
        )
    return per_token(inputs.rewards_N.double() - inputs.baseline_rewards_N.double(), inputs)
