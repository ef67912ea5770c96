"""Corrections with PPO-clip (0.2, 0.28) and `token_mean`, against the values on which verl, TRL, AReaL and SkyRL agree:
loss, norm of its gradient, and the gradient's first entry.

B=8 samples of up to T=12 tokens, torch seed 0.
"""

import pytest
import torch
from miles_is_corrections.icepop import icepop
from miles_is_corrections.mis import mis
from miles_is_corrections.plugin import IcePopOptions, MisOptions, TisOptions
from miles_is_corrections.tis import tis

from miles.api import LossInputs
from miles.builtins.losses import ppo_clip
from miles.builtins.options import PpoClipOptions
from miles.training.aggregation import token_weights

LENGTHS = [12, 7, 3, 9, 12, 5, 8, 10]
ADVANTAGES = [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75]
ALONE = {"reject_level": "none", "veto": None, "normalize": False}
TOKEN_TIS = (-0.0562054, 0.0544930, -0.0057742)
SEQUENCE_TIS = (0.0167935, 0.0777935, -0.0027708)
ICEPOP = (-0.0615162, 0.0462466, -0.0057742)


def batch():
    """Log-probs of the new, old and rollout policy, `[B, T]`, each disturbed from the one before."""
    torch.manual_seed(0)

    def disturbed(before_BT):
        return (before_BT + 0.25 * torch.randn(8, 12)).clamp(max=-0.01)

    new_BT = (torch.randn(8, 12) * 0.4 - 1.2).clamp(max=-0.01)
    old_BT = disturbed(new_BT)
    return new_BT.requires_grad_(), old_BT, disturbed(old_BT)


@pytest.mark.parametrize(
    ("correction", "options", "expected"),
    [
        (tis, TisOptions(), TOKEN_TIS),
        (mis, MisOptions(**ALONE), TOKEN_TIS),
        (mis, MisOptions(level="sequence", **ALONE), SEQUENCE_TIS),
        (icepop, IcePopOptions(low=0.8, high=1.25), ICEPOP),
        (mis, MisOptions(mode="mask", low=0.8, high=1.25, **ALONE), ICEPOP),
        (
            mis,
            MisOptions(level="none", reject_level="geometric", reject_low=0.9, reject_high=1.1, veto=None),
            (-0.0513967, 0.0512627, -0.0050203),  # as SkyRL has it: what is dropped keeps its place in the denominator
        ),
    ],
    ids=["tis", "mis token", "mis sequence", "icepop", "mis mask", "mis geometric rejection"],
)
def test_agrees_with_others(correction, options, expected):
    new_BT, *others = batch()
    there_BT = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    new_T, old_T, rollout_T = (values_BT[there_BT] for values_BT in (new_BT, *others))
    mask_T, bounds = torch.ones(len(new_T)), [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    advantages_T = torch.tensor(ADVANTAGES).repeat_interleave(torch.tensor(LENGTHS))
    found = correction(old_T, rollout_T, mask_T, bounds, options=options)
    inputs = LossInputs(new_T, old_T, advantages_T, mask_T, bounds)
    loss_T = ppo_clip(inputs, options=PpoClipOptions(eps=0.2, eps_high=0.28)).loss_T
    for factor_T in (found.weights_T, found.keep_T):
        loss_T = loss_T if factor_T is None else loss_T * factor_T
    loss = (loss_T * token_weights(mask_T, bounds, torch.arange(8), "token_mean")).sum()
    loss.backward()
    assert (loss.item(), new_BT.grad.norm().item(), new_BT.grad[0, 0].item()) == pytest.approx(expected, abs=1e-7)
