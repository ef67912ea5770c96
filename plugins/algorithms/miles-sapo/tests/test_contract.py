"""The loss and the preset keep the contracts of their kinds."""

from miles.testing import PolicyLossContract, PresetContract


class TestSapo(PolicyLossContract):
    name = "sapo"
    bad_options = [{"tau_pos": 0.0}, {"tau_neg": -1.0}]


class TestSapoPreset(PresetContract):
    name = "sapo"
