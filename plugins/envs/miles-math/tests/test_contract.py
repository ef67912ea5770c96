"""The plugin registers what it says, lightly, and both rewards are built as the protocol says."""

import asyncio
import importlib
import inspect
import subprocess
import sys

import miles_math.plugin as plugin

from miles.api import API_VERSION, Prompt, Sample


def test_every_reward_scores_a_right_and_a_wrong_answer():
    assert plugin.MILES_API == API_VERSION
    for component in plugin.miles_register_rewards().values():
        module, _, attribute = component.target.partition(":")
        reward = getattr(importlib.import_module(module), attribute)(component.options())
        scores = []
        for text in ("42", "43"):
            sample = Sample.begin(Prompt("a:0", "a", text="?", label=42, tokens=[1]), id=0, group_id=0)
            sample.text = text
            score = reward.score(sample)
            score = asyncio.run(score) if inspect.isawaitable(score) else score
            scores.append(score["reward"] if isinstance(score, dict) else score)
        assert scores == [1.0, 0.0]


def test_registering_imports_neither_torch_nor_the_math_library():
    code = (
        "import sys, miles_math.plugin as p; p.miles_register_rewards(); "
        "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
