"""The estimator keeps the contract of its kind."""

from miles.testing import AdvantageEstimatorContract


class TestRemax(AdvantageEstimatorContract):
    name = "remax"
