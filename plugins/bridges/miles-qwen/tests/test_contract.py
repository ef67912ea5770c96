"""The plugin registers what it says, lightly, and each target is what its kind demands."""

from __future__ import annotations

import importlib
import subprocess
import sys

import miles_qwen.plugin as plugin
from transformers import CONFIG_MAPPING

from miles.api import API_VERSION, Bridge


def test_the_bridge_serves_the_model_types_it_names():
    assert plugin.MILES_API == API_VERSION
    for component in plugin.miles_register_bridges().values():
        module, _, attribute = component.target.partition(":")
        bridge = getattr(importlib.import_module(module), attribute)()
        assert isinstance(bridge, Bridge)
        assert component.summary
        for model_type in component.provides:
            config = CONFIG_MAPPING[model_type]()
            assert bridge.config_for("decoder", config)["num_layers"] == config.num_hidden_layers
            assert bridge.weights(config)


def test_registering_imports_no_torch():
    code = "import sys, miles_qwen.plugin as p; p.miles_register_bridges(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
