import pytest
import torch

from miles.api import AdvantageInputs


@pytest.fixture
def inputs_of():
    def build(rewards, lengths, groups=None, rollouts=None, mask=None, kl=None, kl_coef=0.0):
        """A rollout batch of samples without prompts, all trainable unless `mask` says otherwise."""
        count, tokens = len(rewards), sum(lengths)
        return AdvantageInputs(
            rewards_N=torch.tensor(rewards, dtype=torch.float64),
            mask_T=torch.ones(tokens) if mask is None else torch.tensor(mask, dtype=torch.float32),
            bounds=[0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()],
            group_N=torch.tensor(groups or [0] * count, dtype=torch.int64),
            rollout_N=torch.tensor(rollouts or list(range(count)), dtype=torch.int64),
            kl_T=None if kl is None else torch.tensor(kl),
            kl_coef=kl_coef,
        )

    return build


@pytest.fixture
def golden(inputs_of):
    """The batch on which verl and SkyRL were run: two groups of four, 66 tokens."""
    return inputs_of([1, 0, 0, 1, 1, 1, 1, 0], [12, 7, 3, 9, 12, 5, 8, 10], groups=[0] * 4 + [1] * 4)
