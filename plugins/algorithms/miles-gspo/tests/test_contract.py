"""The loss and the preset keep the contracts of their kinds."""

from miles.testing import PolicyLossContract, PresetContract
from miles.toolkit import mean_per_sample, spread_over_samples


class TestGspo(PolicyLossContract):
    name = "gspo"
    options = {"eps": 0.2}
    bad_options = [{"eps": -1.0}, {"eps": 1.5}, {"eps_high": -1.0}, {"eps_clip_c": 1.0}]

    def on_policy_gradient(self, inputs):
        """Tokens of a sequence share its gradient: where their advantages differ, each gets the mean."""
        mean_N = mean_per_sample(inputs.advantages_T, inputs.mask_T, inputs.bounds)
        return -spread_over_samples(mean_N, inputs.bounds, len(inputs.mask_T))


class TestGspoPreset(PresetContract):
    name = "gspo"
