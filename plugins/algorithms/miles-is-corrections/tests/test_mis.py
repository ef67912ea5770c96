"""MIS: by hand, and every level and mode against a loop over samples."""

from math import exp, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_is_corrections.mis import mis
from miles_is_corrections.plugin import MisOptions

from miles.api import ConfigError

PLAIN = {"reject_level": "none", "veto": None, "normalize": False}
A, B = [log(4), log(0.75)], [log(0.2), None, log(0.6)]  # products 3 and 0.12; geometric means 3**0.5 and 0.12**0.5


@pytest.mark.parametrize(
    ("level", "mode", "weights", "keep"),
    [
        ("token", "truncate", [[2, 0.75], [0.2, 1, 0.6]], None),
        ("token", "clip", [[2, 0.75], [0.5, 1, 0.6]], None),
        ("token", "mask", [[4, 0.75], [0.2, 1, 0.6]], [[0, 1], [0, 1, 1]]),
        ("sequence", "truncate", [[2, 2], [0.12, 1, 0.12]], None),
        ("sequence", "clip", [[2, 2], [0.5, 1, 0.5]], None),
        ("sequence", "mask", [[3, 3], [0.12, 1, 0.12]], [[0, 0], [0, 1, 0]]),
        ("geometric", "truncate", [[3**0.5] * 2, [0.12**0.5, 1, 0.12**0.5]], None),
        ("geometric", "clip", [[3**0.5] * 2, [0.5, 1, 0.5]], None),
        ("geometric", "mask", [[3**0.5] * 2, [0.12**0.5, 1, 0.12**0.5]], [[1, 1], [0, 1, 0]]),
    ],
)
def test_each_level_and_mode(corrected, level, mode, weights, keep):
    found = corrected(mis, MisOptions(level=level, mode=mode, **PLAIN), [A, B], pad=2)
    assert [w for ws in found.w for w in ws] == pytest.approx([w for ws in weights for w in ws])
    assert found.keep == keep


@pytest.mark.parametrize(
    ("level", "keep"),
    [
        ("token", [[0, 1], [0, 1, 1]]),
        ("sequence", [[0, 0], [0, 1, 0]]),
        ("geometric", [[1, 1], [0, 1, 0]]),
    ],
)
def test_rejection_without_weights(corrected, level, keep):
    options = MisOptions(level="none", reject_level=level, reject_low=0.5, reject_high=2.0, veto=None)
    found = corrected(mis, options, [A, B])
    assert (found.w, found.keep) == (None, keep)
    dropped = sum(row.count(0) for row in keep)
    assert found.metrics["is/fraction_rejected"] == found.metrics["is/fraction_out_of_bounds"] == dropped / 4


def test_rejection_has_bounds_of_its_own_or_those_of_the_weight(corrected):
    own = MisOptions(reject_low=0.1, reject_high=5.0, veto=None)
    assert corrected(mis, own, [A, B]).keep == [[1, 1], [1, 1, 1]]
    assert MisOptions().reject_bounds == (0.5, 2.0)
    assert MisOptions(high=4.0).bounds == (0.25, 4.0)
    assert MisOptions(low=0.4, reject_high=8.0).reject_bounds == (0.4, 8.0)


def test_a_veto_drops_the_whole_sample(corrected):
    veto = MisOptions(level="none", reject_level="none", veto=1e-4)
    samples = [[0.0, log(1e-4) - 0.01, 0.0], [0.0, log(1e-4) + 0.01], [None, 0.0]]
    found = corrected(mis, veto, samples)
    assert found.keep == [[0, 0, 0], [1, 1], [1, 1]]
    assert found.metrics["is/veto_tokens"] == pytest.approx(1 / 6)
    assert found.metrics["is/veto_samples"] == pytest.approx(1 / 3)


def test_a_token_without_a_loss_vetoes_nothing(corrected):
    veto = MisOptions(level="none", reject_level="none")
    assert corrected(mis, veto, [[-3.0, None]]).keep == [[1, 1]]


def test_normalised_by_the_mean_over_tokens_before_rejection(corrected):
    # truncated weights 2, 0.75, 0.2, 0.6: their mean is 3.55 / 4
    found = corrected(mis, MisOptions(veto=None), [A, B])
    mean = 3.55 / 4
    assert found.w[0] == pytest.approx([2 / mean, 0.75 / mean])
    assert found.w[1] == pytest.approx([0.2 / mean, 1, 0.6 / mean])
    assert found.keep == [[0, 1], [0, 1, 1]]
    assert found.metrics["is/normalizer"] == pytest.approx(mean)
    assert found.metrics["is/weight_mean"] == pytest.approx((0.75 + 0.6) / mean / 4)


def test_normalised_by_the_mean_over_samples_for_weights_of_samples(corrected):
    # weights of samples 2, 0.12 and 1, however long they are
    found = corrected(mis, MisOptions(level="sequence", reject_level="none"), [A, B, [0.0] * 7, [None]])
    mean = 3.12 / 3
    assert found.w[1] == pytest.approx([0.12 / mean, 1, 0.12 / mean])
    assert found.metrics["is/normalizer"] == pytest.approx(mean)


def test_what_the_mode_mask_drops_has_no_say_in_the_mean(corrected):
    options = MisOptions(mode="mask", normalize=True, reject_level="none", veto=None)
    found = corrected(mis, options, [[50.0, log(1.5)], [0.0]])
    assert found.w[0][1] == pytest.approx(1.5 / 1.25)
    assert found.w[1] == pytest.approx([1 / 1.25])


def test_probabilities_of_zero_in_both_policies_of_one_sample_can_be_added(corrected):
    inf = float("inf")
    found = corrected(mis, MisOptions(level="sequence", reject_level="none", veto=None), [[inf, -inf, log(1.5)], [0.0]])
    assert found.w[0] == pytest.approx([1.5 / 1.25] * 3, rel=1e-5)


def test_mismatch_by_hand(corrected):
    told = corrected(mis, MisOptions(), [[log(2), log(0.5)], [log(4), None]]).metrics
    assert told["is/k3_kl"] == pytest.approx((2 - 1 - log(2) + 0.5 - 1 + log(2) + 4 - 1 - log(4)) / 3)
    assert told["is/chi2_token"] == pytest.approx((4 + 0.25 + 16) / 3 - 1)
    assert told["is/chi2_sequence"] == pytest.approx((1 + 16) / 2 - 1)
    assert told["is/log_ppl_diff"] == pytest.approx(-log(4) / 2)
    assert told["is/log_ppl_abs_diff"] == pytest.approx(log(4) / 2)
    assert told["is/ppl_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"low": 3.0}, "low, high = 3, 2: the lower bound is not below"),
        ({"reject_low": 1.5}, "reject_low, reject_high = 1.5, 2: leave out 1"),
        ({"level": "geometric", "normalize": True}, "geometric means are near 1 by themselves"),
        ({"level": "none", "normalize": True}, "normalize is about weights"),
        ({"level": "none", "mode": "mask"}, "mode=mask is about weights"),
        ({"level": "none", "reject_level": "none", "veto": None}, "does nothing"),
        ({"reject_level": "none", "reject_low": 0.3}, "reject_level is none"),
        ({"veto": 2.0}, "between 0 and 1"),
    ],
)
def test_contradictions_are_refused_with_the_reason(options, problem):
    with pytest.raises(ConfigError, match=problem):
        MisOptions(**options)


def by_loop(options, samples):
    """(weight, kept) of every trainable token, a sample at a time, straight from the definition."""
    level_of = {
        "token": lambda ls: ls,
        "sequence": lambda ls: [sum(ls)] * len(ls),
        "geometric": lambda ls: [sum(ls) / len(ls)] * len(ls),
    }
    (low, high), found = options.bounds, []
    for ls in samples:
        rho = [exp(max(-20, min(20, value))) for value in level_of[options.level](ls)] if ls else []
        reject = [exp(max(-20, min(20, value))) for value in level_of[options.reject_level](ls)] if ls else []
        weights = {
            "truncate": [min(r, high) for r in rho],
            "clip": [max(low, min(r, high)) for r in rho],
            "mask": rho,
        }[options.mode]
        vetoed = any(value < log(options.veto) for value in ls)
        kept = [options.reject_bounds[0] <= r <= options.reject_bounds[1] and not vetoed for r in reject]
        if options.mode == "mask":
            kept = [k and low <= r <= high for k, r in zip(kept, rho, strict=True)]
        found.append((weights, kept))
    return found


LEVELS = st.sampled_from(["token", "sequence", "geometric"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.one_of(st.floats(-3, 3), st.floats(-60, 60)), max_size=5), min_size=1, max_size=5),
    LEVELS,
    LEVELS,
    st.sampled_from(["truncate", "clip", "mask"]),
    st.data(),
)
def test_agrees_with_a_loop_in_any_order_of_samples(corrected, samples, level, reject_level, mode, data):
    samples = [[round(value, 3) for value in sample] for sample in samples]
    options = MisOptions(level=level, mode=mode, reject_level=reject_level, reject_high=2.718, normalize=False)
    order = data.draw(st.permutations(range(len(samples))))
    found = corrected(mis, options, [samples[i] for i in order])
    for (weights, kept), w, k in zip([by_loop(options, samples)[i] for i in order], found.w, found.keep, strict=True):
        assert w == pytest.approx(weights, rel=1e-3)
        assert [bool(x) for x in k] == kept
    assert 0 <= found.metrics["is/effective_sample_size"] <= 1 + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.floats(-60, 60), max_size=4), min_size=1, max_size=5), LEVELS, st.data())
def test_normalised_weights_do_not_depend_on_the_order_either(corrected, samples, reject_level, data):
    options = MisOptions(level=data.draw(st.sampled_from(["token", "sequence"])), reject_level=reject_level)
    order = data.draw(st.permutations(range(len(samples))))
    whole, shuffled = (corrected(mis, options, s) for s in (samples, [samples[i] for i in order]))
    assert [w for i in order for w in whole.w[i]] == pytest.approx([w for ws in shuffled.w for w in ws])
    assert [whole.keep[i] for i in order] == shuffled.keep
    assert shuffled.metrics == pytest.approx(whole.metrics)
