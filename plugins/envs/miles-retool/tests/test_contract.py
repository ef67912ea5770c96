"""The environment and the reward keep the contracts of their kinds."""

import pytest
from miles_retool.plugin import RetoolOptions
from miles_retool.sandbox.pool import shared_sandbox

from miles.api import Action, Sample, ToolCall, WorkerError
from miles.testing import EnvironmentContract, RewardContract


@pytest.fixture(scope="module", autouse=True)
def protected():
    """Skips where this machine cannot protect what the environment demands by default."""
    options = RetoolOptions()
    try:
        shared_sandbox(options.limits, options.packages, options.concurrency, options.require).start()
    except WorkerError as error:
        pytest.skip(str(error))


def call(code):
    return Action("", tool_calls=(ToolCall("code_interpreter", {"code": code}, "call_0"),))


class TestTools(EnvironmentContract):
    name = "retool"
    prompt = {"text": "What is 6 * 7?", "label": "42"}
    actions = [call("print(6 * 7)"), call("1 / 0"), Action("Answer: \\boxed{42}")]
    ends = True
    rewards = [None, None, None]
    bad_options = [
        {"seconds": 0},
        {"concurrency": 0},
        {"max_tool_calls": 0},
        {"protocol": "xml"},
        {"require": ("privacy",)},
        {"open_files": 3},
    ]


class TestText(EnvironmentContract):
    name = "retool"
    options = {"protocol": "text"}
    prompt = {"text": "What is 6 * 7?", "label": "42"}
    actions = [Action("<code>\nprint(6 * 7)\n</code>"), Action("hm"), Action("Answer: \\boxed{42}")]
    ends = True
    rewards = [None, None, None]


class TestReward(RewardContract):
    name = "retool"
    cases = [("Answer: \\boxed{84/2}", "42", 1.0), ("Answer: \\boxed{43}", "42", -0.9), ("42", "42", -0.9)]
    bad_options = [{"wrong": 0.0}, {"most_when_wrong": 1.0}, {"per_call": -0.1}, {"timeout": 0}, {"workers": 0}]

    def sample(self, text, label, id=0) -> Sample:
        """One that ran two programs."""
        sample = super().sample(text, label, id)
        sample.metadata["environment"] = {"tool_calls": 3, "programs": 2}
        return sample
