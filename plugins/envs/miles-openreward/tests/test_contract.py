"""What miles asks of every environment and every reward."""

import pytest

from miles.api import Action, ToolCall
from miles.testing import EnvironmentContract, RewardContract


def move(by):
    return Action("", tool_calls=(ToolCall("move", {"by": by}, "call_0"),))


@pytest.fixture(scope="class", autouse=True)
def world(request, url, worlds):
    """The contract is about a game on a server: its address is known only now."""
    if issubclass(request.cls, EnvironmentContract):
        request.cls.options = {"base_url": url}
        request.cls.prompt = {"text": "?", "metadata": worlds.row("Counter", goal=3)}


class TestOpenReward(EnvironmentContract):
    name = "openreward"
    actions = [move(2), move(1)]
    ends = True
    rewards = [0.25, 1.0]
    bad_options = [
        {"base_url": "127.0.0.1:8080"},
        {"system_prompt_template": "no place for them"},
        {"system_prompt_template": "{{tools}}"},
        {"system_prompt_template": '{tools} {"name": 1}'},
    ]


class TestOpenRewardReward(RewardContract):
    name = "openreward"
    bad_options = [{"min_reward": 1.0, "max_reward": 0.0}, {"reward_reduction": "median"}]
