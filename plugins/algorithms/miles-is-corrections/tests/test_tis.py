"""TIS and IcePop: token weights, by hand."""

from math import exp, log

import pytest
import torch
from miles_is_corrections.icepop import icepop
from miles_is_corrections.plugin import IcePopOptions, TisOptions
from miles_is_corrections.tis import tis

from miles.api import ConfigError, TrainError

L = [[log(3), log(1.5)], [None, log(0.25), 0.0]]


def test_tis_clips_at_both_bounds(corrected):
    found = corrected(tis, TisOptions(), L)
    assert found.w[0] == pytest.approx([2, 1.5])
    assert found.w[1] == pytest.approx([1, 0.25, 1])
    assert found.keep is None
    assert corrected(tis, TisOptions(low=0.5, high=None), L).w[0] == pytest.approx([3, 1.5])
    assert corrected(tis, TisOptions(low=0.5, high=None), L).w[1] == pytest.approx([1, 0.5, 1])


def test_metrics_of_tis_by_hand(corrected):
    # ratios 3, 1.5, 0.25, 1; weights 2, 1.5, 0.25, 1: sum 4.75, sum of squares 4 + 2.25 + 0.0625 + 1 = 7.3125
    assert corrected(tis, TisOptions(), L).metrics == pytest.approx(
        {
            "is/ratio_mean": 5.75 / 4,
            "is/weight_mean": 4.75 / 4,
            "is/weight_max": 2,
            "is/effective_sample_size": 4.75**2 / (4 * 7.3125),
            "is/fraction_low": 0,
            "is/fraction_high": 0.25,
            "is/fraction_rejected": 0,
        }
    )


def test_icepop_drops_what_is_out_of_bounds(corrected):
    found = corrected(icepop, IcePopOptions(low=0.5, high=2.0), L)
    assert found.w[0] == pytest.approx([0, 1.5])
    assert found.w[1] == pytest.approx([1, 0, 1])
    told = found.metrics
    assert (told["is/fraction_low"], told["is/fraction_high"], told["is/fraction_rejected"]) == (0.25, 0.25, 0.5)
    assert told["is/weight_mean"] == pytest.approx(2.5 / 4)
    assert told["is/effective_sample_size"] == pytest.approx(2.5**2 / (4 * 3.25))
    assert corrected(icepop, IcePopOptions(low=None, high=2.0), L).w[1] == pytest.approx([1, 0.25, 1])


def test_everything_dropped_is_an_effective_sample_size_of_zero(corrected):
    told = corrected(icepop, IcePopOptions(), [[50.0, -50.0]]).metrics
    assert told["is/effective_sample_size"] == told["is/weight_mean"] == told["is/weight_max"] == 0
    assert told["is/fraction_rejected"] == 1


@pytest.mark.parametrize(("function", "options"), [(tis, TisOptions(high=None)), (icepop, IcePopOptions(high=None))])
def test_log_ratios_are_clamped(corrected, function, options):
    assert corrected(function, options, [[50.0, 0.0]]).w[0] == pytest.approx([exp(20), 1])
    assert corrected(function, options, [[float("inf"), 0.0]]).w[0] == pytest.approx([exp(20), 1])


def test_a_batch_without_trainable_tokens(corrected):
    found = corrected(tis, TisOptions(), [[None, None], []])
    assert found.w == [[1, 1], []]
    assert set(found.metrics.values()) == {0}
    assert corrected(tis, TisOptions(), []).w == []


def test_a_log_prob_that_is_not_a_number_is_refused_where_it_counts(corrected):
    with pytest.raises(TrainError, match="log-probs of 1 trainable tokens"):
        corrected(tis, TisOptions(), [[float("nan"), 0.0]])
    mask_T, train_T = torch.tensor([0.0, 1.0]), torch.tensor([float("nan"), -1.0])
    assert tis(train_T, torch.tensor([-1.0, -1.0]), mask_T, [0, 2], options=TisOptions()).weights_T.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        ({"low": -0.1}, "not negative"),
        ({"low": 1.0, "high": 1.0}, "not below the upper"),
        ({"low": float("nan")}, "not below the upper"),
        ({"low": 1.2}, "leave out 1"),
        ({"high": 0.8}, "leave out 1"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds, problem):
    with pytest.raises(ConfigError, match=rf"tis: low, high = .*{problem}"):
        TisOptions(**bounds)
    with pytest.raises(ConfigError, match=rf"icepop: low, high = .*{problem}"):
        IcePopOptions(**bounds)
