"""The estimators keep the contract of their kind."""

from miles.testing import AdvantageEstimatorContract


class TestGrpo(AdvantageEstimatorContract):
    name = "grpo"
    bad_options = [{"epsilon": -1.0}]


class TestDrGrpo(AdvantageEstimatorContract):
    name = "dr_grpo"
