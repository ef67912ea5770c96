"""The estimator and the preset keep the contracts of their kinds."""

from miles.testing import AdvantageEstimatorContract, PresetContract


class TestGae(AdvantageEstimatorContract):
    name = "gae"
    bad_options = [{"gamma": -0.1}, {"gamma": 1.1}, {"lam": 2.0}, {"lam": float("nan")}]


class TestGaeLooksAhead(AdvantageEstimatorContract):
    name = "gae"
    options = {"gamma": 0.99, "lam": 0.9}


class TestPpo(PresetContract):
    name = "ppo"
