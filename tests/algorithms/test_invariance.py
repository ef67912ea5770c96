"""However a batch is cut into micro-batches, shared among ranks, padded or ordered: the step is the same. With every
policy loss, correction, loss mask, average and estimator that is installed."""

import sys
from types import SimpleNamespace

import pytest
import torch
from onestep import one_step, plugins, random_batch

from miles.registry import Registry
from miles.types import PolicyLoss

AVERAGES = ("sample_mean", "token_mean", "constant", "sequence_sum")
CUTS = {
    "micro-batches": {"max_tokens": 25},
    "one sample a micro-batch": {"max_tokens": 1},
    "a pad": {"pad": 5},
    "order": {"order": [7, 2, 11, 0, 4, 9, 1, 3, 10, 8, 6, 5]},
    "ranks": {"ranks": 3, "max_tokens": 40},
    "more ranks than samples": {"ranks": 16},
    "all of it": {"ranks": 2, "max_tokens": 30, "pad": 3, "order": [7, 2, 11, 0, 4, 9, 1, 3, 10, 8, 6, 5]},
}


REGISTRY = Registry(plugins())
LOSSES = [o.name for o in REGISTRY.offers("policy_losses")]
CORRECTIONS = [o.name for o in REGISTRY.offers("is_corrections")]
MASKS = [o.name for o in REGISTRY.offers("loss_masks")]
ESTIMATORS = [o.name for o in REGISTRY.offers("advantage_estimators")]
GRADIENTS = ("gradient_BS", "logits_gradient_BSV", "value_gradient_BS")


def assert_cuts_change_nothing(cuts=CUTS, **settings):
    batch = random_batch(3, spread=1.0)
    whole = one_step(batch, **settings)
    assert any(getattr(whole, name).any() for name in GRADIENTS)
    for cut in cuts:
        step = one_step(batch, **CUTS[cut], **settings)
        for name in GRADIENTS:
            found, expected = getattr(step, name), getattr(whole, name)
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4, msg=lambda m, cut=cut: f"{cut}: {m}")
        assert lasting(step.metrics) == pytest.approx(lasting(whole.metrics), rel=1e-4, abs=1e-6), cut


def lasting(metrics):
    """All but times."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_averages(loss, average):
    assert_cuts_change_nothing(policy_loss=loss, loss_aggregation=average)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_corrections_of_losses_and_averages(loss, correction, average):
    assert_cuts_change_nothing(["all of it"], policy_loss=loss, is_correction=correction, loss_aggregation=average)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_penalties(mask):
    assert_cuts_change_nothing(
        policy_loss="ppo_clip", loss_masks=[mask], kl_loss_coef=0.1, kl_type="k3", unbiased_kl=True, entropy_coef=0.01
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name):
    """What needs a critic trains it too."""
    assert_cuts_change_nothing(given=False, advantage_estimator=name, kl_coef=0.05)


def test_a_loss_that_looks_at_its_micro_batch_is_caught(monkeypatch):
    def averages(inputs):
        return PolicyLoss(-inputs.advantages_T * inputs.log_probs_T / inputs.mask_T.sum())

    monkeypatch.setitem(sys.modules, "wrong", SimpleNamespace(averages=averages))
    with pytest.raises(AssertionError, match="^micro-batches: "):
        assert_cuts_change_nothing(policy_loss="wrong:averages")
