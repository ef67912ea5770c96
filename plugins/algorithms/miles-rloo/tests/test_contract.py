"""The estimator keeps the contract of its kind."""

from miles.testing import AdvantageEstimatorContract


class TestRloo(AdvantageEstimatorContract):
    name = "rloo"
