"""OPSM against hand-worked masks, an independent loop, and through the command line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miles_opsm.opsm import opsm
from miles_opsm.plugin import OpsmOptions

from miles.api import ConfigError, LossInputs
from miles.config.load import resolve


def inputs_of(left, advantages, masks=None):
    """Samples given by `old - new` of their tokens."""
    bounds = [0, *torch.tensor([len(sample) for sample in left]).cumsum(0).tolist()]
    old_T = torch.full((bounds[-1],), -1.0)
    new_T = old_T - torch.tensor([value for sample in left for value in sample])
    mask_T = torch.ones(bounds[-1]) if masks is None else torch.tensor([m for mask in masks for m in mask]).float()
    advantages_T = torch.tensor([a for sample in advantages for a in sample])
    return LossInputs(new_T.requires_grad_(), old_T, advantages_T, mask_T, bounds)


def test_by_hand():
    left = [[0.3, 0.1], [0.3, 0.1], [0.3, -0.3], [-0.9, -0.9], [0.1]]
    advantages = [[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0]]
    keep_T = opsm(inputs_of(left, advantages), options=OpsmOptions(delta=0.15))
    # left by 0.2 and bad; left and good; not left on the whole; come nearer; left by less than delta
    assert keep_T.tolist() == [False, False, True, True, True, True, True, True, True]


def test_advantages_are_looked_at_token_by_token_and_zero_is_kept():
    keep_T = opsm(inputs_of([[0.5, 0.5, 0.5]], [[-1.0, 0.0, 2.0]]), options=OpsmOptions())
    assert keep_T.tolist() == [False, True, True]


def test_only_trainable_tokens_make_the_mean():
    left, advantages = [[0.0, 5.0, 0.0], [5.0, 5.0]], [[-1.0, -1.0, -1.0], [-1.0, -1.0]]
    keep_T = opsm(inputs_of(left, advantages, masks=[[1, 0, 1], [0, 0]]), options=OpsmOptions())
    assert keep_T.all()


def test_the_usual_delta_is_that_of_slime():
    assert opsm(inputs_of([[2e-4], [0.5e-4]], [[-1.0], [-1.0]]), options=OpsmOptions()).tolist() == [False, True]


def test_log_ratios_of_fifty_give_a_mask():
    keep_T = opsm(inputs_of([[50.0, -20.0], [-50.0], [1e30]], [[-1.0, -1.0], [-1.0], [-1.0]]), options=OpsmOptions())
    assert keep_T.tolist() == [False, False, True, False]


@given(
    st.lists(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=5, max_size=5),
)
def test_agrees_with_a_loop_over_samples(left, signs):
    advantages = [[sign] * len(sample) for sign, sample in zip(signs, left, strict=False)]
    keep_T = opsm(inputs_of(left, advantages), options=OpsmOptions(delta=0.1))
    expected = []
    for sign, sample in zip(signs, left, strict=False):
        mean = sum(sample) / len(sample)
        if abs(mean - 0.1) < 1e-5:
            return  # rounding decides
        expected += [not (sign < 0 and mean > 0.1)] * len(sample)
    assert keep_T.tolist() == expected


def test_flags_of_slime_select_it():
    own = {"algorithm.advantage_estimator": lambda inputs: inputs.mask_T}  # so that no other package must be installed
    config = resolve(arguments=["--use-opsm", "--opsm-delta", "0.01"], overrides=own, purpose="show").config
    assert [(mask.name, mask.options) for mask in config.algorithm.loss_masks] == [("opsm", {"delta": 0.01})]


def test_a_negative_delta_is_refused():
    with pytest.raises(ConfigError, match="delta"):
        OpsmOptions(delta=-1.0)
