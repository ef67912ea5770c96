"""The estimators and the preset keep the contracts of their kinds."""

from miles.testing import AdvantageEstimatorContract, PresetContract


class TestGrpo(AdvantageEstimatorContract):
    name = "grpo"
    bad_options = [{"epsilon": -1.0}]


class TestDrGrpo(AdvantageEstimatorContract):
    name = "dr_grpo"


class TestDapo(PresetContract):
    name = "dapo"
