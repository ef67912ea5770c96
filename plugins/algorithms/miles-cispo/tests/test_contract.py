"""The loss and the preset keep the contracts of their kinds."""

from miles.testing import PolicyLossContract, PresetContract


class TestCispo(PolicyLossContract):
    name = "cispo"
    bad_options = [{"eps": -0.1}, {"eps_high": -0.1}]


class TestCispoBoundedBelow(PolicyLossContract):
    name = "cispo"
    options = {"eps": 0.2, "eps_high": 0.28}


class TestCispoPreset(PresetContract):
    name = "cispo"
