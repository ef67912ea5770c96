"""GSPO against hand-worked numbers, the values of other frameworks, and the invariances of numerics."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_gspo.gspo import gspo
from miles_gspo.plugin import GspoOptions

from miles.api import ConfigError, LossInputs
from miles.testing import golden_batch, measured


def inputs_of(log_ratios, advantages, masks=None):
    """Samples given by their tokens' log-ratios, one advantage a sample; old log-probs are -1."""
    bounds = [0, *torch.tensor([len(sample) for sample in log_ratios]).cumsum(0).tolist()]
    shift_T = torch.tensor([value for sample in log_ratios for value in sample])
    mask_T = torch.ones(bounds[-1]) if masks is None else torch.tensor([m for mask in masks for m in mask]).float()
    advantages_T = torch.tensor([a for a, sample in zip(advantages, log_ratios, strict=True) for _ in sample]).float()
    old_T = torch.full((bounds[-1],), -1.0)
    return LossInputs((old_T + shift_T).requires_grad_(), old_T, advantages_T, mask_T, bounds)


def test_by_hand():
    log2 = math.log(2)
    inputs = inputs_of([[log2, 0.0], [-log2, -log2, -log2], [4 * log2, 0.0]], [1.0, -1.0, -2.0])
    result = gspo(inputs, options=GspoOptions(eps=0.2, eps_high=0.3))
    # ratios sqrt(2), 1/2 and 4: clipped at 1.3, clipped at 0.8, and -s A, which no clip bounds
    root = math.sqrt(2)
    torch.testing.assert_close(result.loss_T, torch.tensor([-1.3, -1.3, 0.8, 0.8, 0.8, 8.0, 8.0]))
    assert result.metrics_T["ratio"].tolist() == pytest.approx([root, root, 0.5, 0.5, 0.5, 4.0, 4.0])
    assert result.metrics_T["pg_clipfrac_high"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert result.metrics_T["pg_clipfrac_low"].tolist() == [0, 0, 1, 1, 1, 0, 0]
    result.loss_T.sum().backward()
    # the third sequence: two tokens of loss 2 s, each with half of d log s / d lp
    assert inputs.log_probs_T.grad.tolist() == pytest.approx([0, 0, 0, 0, 0, 8.0, 8.0])


def test_dual_clip_bounds_a_large_ratio_of_a_negative_advantage():
    inputs = inputs_of([[math.log(4.0)] * 3, [math.log(4.0)]], [-2.0, 2.0])
    result = gspo(inputs, options=GspoOptions(eps=0.2, eps_clip_c=3.0))
    torch.testing.assert_close(result.loss_T, torch.tensor([6.0, 6.0, 6.0, -2.4]))
    assert result.metrics_T["pg_clipfrac_dual"].tolist() == [1, 1, 1, 0]
    result.loss_T.sum().backward()
    assert inputs.log_probs_T.grad.tolist() == [0, 0, 0, 0]


def test_only_trainable_tokens_make_the_ratio():
    inputs = inputs_of([[0.2, 9.0, 0.4]], [1.0], masks=[[1, 0, 1]])
    result = gspo(inputs, options=GspoOptions(eps=0.9))
    assert result.metrics_T["ratio"].tolist() == pytest.approx([math.exp(0.3)] * 3)
    (result.loss_T * inputs.mask_T).sum().backward()
    assert inputs.log_probs_T.grad.tolist() == pytest.approx([-math.exp(0.3), 0, -math.exp(0.3)])


def test_agrees_with_verl_trl_skyrl_and_slime():
    loss = partial(gspo, options=GspoOptions(eps=0.2, eps_high=0.28))
    expected = (-0.0067983, 0.0613944, -0.0054290)
    assert measured(loss, golden_batch(), "sample_mean") == pytest.approx(expected, abs=1e-7)


def test_agrees_with_areal_where_tokens_are_averaged():
    loss = partial(gspo, options=GspoOptions(eps=0.2, eps_high=0.28))
    found, norm, _ = measured(loss, golden_batch(), "token_mean")
    assert (found, norm) == pytest.approx((-0.0732836, 0.0582462), abs=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_log_ratios_of_fifty_are_finite(advantage):
    inputs = inputs_of([[50.0] * 4, [-50.0] * 4, [50.0, -50.0], [1e30, 1e30]], [advantage] * 4)
    result = gspo(inputs, options=GspoOptions())
    assert result.loss_T.isfinite().all()
    assert result.metrics_T["ratio"][8:10].tolist() == [1, 1]  # they cancel, which tokens clamped alone would too
    result.loss_T.sum().backward()
    assert inputs.log_probs_T.grad.isfinite().all()


def test_the_mean_is_clamped_and_not_the_tokens():
    inputs = inputs_of([[30.0, 0.0, 0.0]], [-1.0])
    result = gspo(inputs, options=GspoOptions())
    assert result.loss_T.tolist() == pytest.approx([math.exp(10)] * 3, rel=1e-5)
    result.loss_T.sum().backward()
    assert inputs.log_probs_T.grad[0] == inputs.log_probs_T.grad[1]  # the far token shares the gradient


def test_samples_without_trainable_tokens_and_a_pad():
    inputs = inputs_of([[5.0, 5.0], [], [0.1]], [1.0, 1.0, 1.0], masks=[[0, 0], [], [1]])
    pad = {name: torch.cat([getattr(inputs, name).detach(), torch.ones(2)]) for name in ("log_probs_T", "mask_T")}
    pad |= {name: torch.cat([getattr(inputs, name), torch.ones(2)]) for name in ("old_log_probs_T", "advantages_T")}
    result = gspo(replace(inputs, **pad), options=GspoOptions(eps=0.5))
    assert result.metrics_T["ratio"].tolist() == pytest.approx([1, 1, math.exp(0.1), 1, 1])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=5), min_size=1, max_size=5), st.data())
def test_order_and_company_do_not_matter(samples, data):
    order = data.draw(st.permutations(range(len(samples))))
    options = GspoOptions(eps=0.2, eps_clip_c=3.0)
    advantages = [1.0 if i % 2 else -1.0 for i in range(len(samples))]
    alone = [gspo(inputs_of([s], [a]), options=options).loss_T for s, a in zip(samples, advantages, strict=True)]
    together = gspo(inputs_of([samples[i] for i in order], [advantages[i] for i in order]), options=options)
    torch.testing.assert_close(together.loss_T, torch.cat([alone[i] for i in order]))


@pytest.mark.parametrize("options", [{"eps": 1.5}, {"eps": -0.1}, {"eps_high": -1.0}, {"eps_clip_c": 1.0}])
def test_impossible_bounds_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GspoOptions(**options)
