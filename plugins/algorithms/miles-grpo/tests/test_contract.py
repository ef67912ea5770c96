"""The plugin registers what it says, lightly, and each target can be called as its protocol demands."""

import dataclasses
import importlib
import subprocess
import sys

import miles_grpo.plugin as plugin
import torch

from miles.api import API_VERSION, AdvantageInputs


def test_every_estimator_returns_one_finite_advantage_a_token():
    assert plugin.MILES_API == API_VERSION
    inputs = AdvantageInputs(
        rewards_N=torch.tensor([1.0, 0.0]),
        mask_T=torch.tensor([0.0, 1, 0, 1, 1]),
        bounds=[0, 2, 5],
        group_N=torch.tensor([0, 0]),
        rollout_N=torch.tensor([0, 1]),
    )
    for component in plugin.miles_register_advantage_estimators().values():
        module, _, attribute = component.target.partition(":")
        arguments = {"options": component.options()} if component.options else {}
        advantages_T = getattr(importlib.import_module(module), attribute)(inputs, **arguments)
        assert advantages_T.shape == (5,)
        assert advantages_T.isfinite().all()
        assert component.summary
        assert component.paper


def test_flags_name_options_that_exist():
    for component in plugin.miles_register_advantage_estimators().values():
        fields = {field.name for field in dataclasses.fields(component.options)} if component.options else set()
        assert set(component.flags.values()) <= fields


def test_registering_imports_no_torch():
    code = (
        "import sys, miles_grpo.plugin as p; p.miles_register_advantage_estimators(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_preset_is_a_config_that_validates():
    from miles.config import Config

    [(name, overlay)] = plugin.miles_register_presets().items()
    config = Config.model_validate(overlay)
    assert name == "dapo"
    assert config.algorithm.loss_aggregation == "token_mean"
    assert config.algorithm.policy_loss.options == {"eps": 0.2, "eps_high": 0.28}
    assert [str(spec) for spec in config.rollout.filters] == ["agreeing_rewards"]
