"""The estimators keep the contract of their kind."""

from miles.testing import AdvantageEstimatorContract


class TestReinforcePlusPlus(AdvantageEstimatorContract):
    name = "reinforce_plus_plus"
    bad_options = [{"gamma": -0.1}, {"gamma": 1.1}, {"gamma": float("nan")}]


class TestReinforcePlusPlusBaseline(AdvantageEstimatorContract):
    name = "reinforce_plus_plus_baseline"
