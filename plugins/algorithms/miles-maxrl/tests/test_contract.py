"""The estimator keeps the contract of its kind."""

from miles.testing import AdvantageEstimatorContract


class TestMaxrl(AdvantageEstimatorContract):
    name = "maxrl"
    skips = {
        "test_degenerate_batches_are_finite": "one of its batches has negative rewards, which are refused; the others "
        "stand in test_maxrl.py"
    }
