"""Episodes against environments that the SDK's own server serves on loopback."""

import asyncio
import json
import re

import pytest
from miles_openreward.environment import NO_CALL, OpenReward, SessionError
from miles_openreward.plugin import OpenRewardOptions

from miles.api import Action, ConfigError, DataError, Prompt, ToolCall
from miles.options import read_options


def call(name, id="call_0", **arguments):
    return ToolCall(name, arguments, id)


def turn(*calls):
    return Action("", tool_calls=calls)


@pytest.fixture
def play(url, worlds, nobody_left):
    """(observation, steps) of an episode."""

    def run(world, *actions, goal=4, metadata=None, **options):
        async def main():
            made = OpenReward(OpenRewardOptions(**{"base_url": url, **options}))
            try:
                row = worlds.row(world, goal) if metadata is None else metadata
                return await made.reset(Prompt("set:0", "set", metadata=row)), [await made.step(a) for a in actions]
            finally:
                await made.close()

        return asyncio.run(main())

    return run


def test_a_game(play):
    observation, steps = play("Counter", turn(call("move", by=3)), turn(call("move", by=1)))
    assert observation.messages == ({"role": "user", "content": "Reach 4.\nBegin at 0."},)
    offered = {tool["function"]["name"]: tool["function"] for tool in observation.tools}
    assert offered["look"]["parameters"] == {"type": "object", "properties": {}}
    assert offered["move"] == {
        "name": "move",
        "description": "Go on.",
        "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]},
    }
    assert [(step.reward, step.done) for step in steps] == [(0.25, False), (1.0, True)]
    assert steps[0].messages == ({"role": "tool", "name": "move", "tool_call_id": "call_0", "content": "at 3"},)


def test_calls_of_a_turn_are_made_in_order_up_to_the_end_and_pay_together(play):
    calls = [call("move", "a", by=1), call("look", "b"), call("move", "c", by=3), call("move", "d", by=9)]
    _, (step,) = play("Counter", turn(*calls))
    assert [m["content"] for m in step.messages] == ["at 1", "at 1\nof many", "at 4"]
    assert (step.reward, step.done) == (1.25, True)
    assert step.info == {"tool_calls": 3, "tool_errors": 0, "paid": [0.25, 1.0]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (call("fly"), "'fly' is not a valid tool"),
        (call("move", by="far"), "valid integer"),
        (call("move"), "Field required"),
        (call("move", by=float("nan")), "JSON"),
        (ToolCall("", {"raw": "{"}, "call_0", error="the call is not JSON: at 1"), "the call is not JSON"),
    ],
)
def test_a_call_that_does_not_fit_is_answered_and_the_game_goes_on(play, wrong, said):
    _, (step, after) = play("Counter", turn(wrong), turn(call("move", by=4)))
    (message,) = step.messages
    assert message["content"].startswith("Error: ")
    assert said in message["content"]
    assert (step.reward, step.done, step.info) == (None, False, {"tool_calls": 1, "tool_errors": 1, "paid": []})
    assert after.done


def test_a_turn_without_a_call_is_the_answer_where_there_is_a_terminal_tool(play):
    observation, (step,) = play("Exam", Action("4"))
    assert "submit" not in {tool["function"]["name"] for tool in observation.tools}
    assert (step.reward, step.done, step.info["paid"]) == (1.0, True, [1.0])
    assert play("Exam", Action("five \ud800"))[1][0].reward == 0.0


def test_an_answer_that_the_terminal_tool_does_not_take_may_be_given_again(play):
    _, (step, after) = play("Exam", Action("four " * 50), Action("4"))
    assert step.messages[0]["content"].startswith("Error: ")
    assert (step.reward, step.done) == (None, False)
    assert (after.reward, after.done) == (1.0, True)


def test_a_turn_without_a_call_is_told_so_elsewhere(play):
    _, (step, after) = play("Counter", Action("4"), turn(call("move", by=4)))
    assert step.messages == ({"role": "user", "content": NO_CALL},)
    assert not step.done
    assert after.done


def test_a_turn_that_was_cut_off_is_not_played(play):
    whole, cut = turn(call("move", by=4)), Action("I thi", finish_reason="length")
    _, (step, after) = play("Exam", cut, whole)
    assert (step.messages, step.reward) == ((), None)
    assert after.messages[0]["content"] == "at 4"


def test_a_system_prompt_lists_tools_and_calls_are_read_from_what_is_said(play):
    template = "Tools:\n{tools}\nWrite {{call}}."
    said = Action('<tool_call>{"name": "move", "arguments": {"by": 4}}</tool_call>')
    observation, (step,) = play("Counter", said, system_prompt_template=template)
    system, user = observation.messages
    first, look, move, last = system["content"].split("\n")
    assert (first, last) == ("Tools:", "Write {call}.")
    assert '"name": "look"' in look
    assert '"by"' in move
    assert observation.tools == ()
    assert user["content"] == "Reach 4.\nBegin at 0."
    assert step.done


def test_an_environment_may_begin_in_the_middle_of_a_conversation(play):
    observation, _ = play("Dialogue")
    system, user, assistant, result = observation.messages
    assert (system["content"], user["content"], result["content"]) == ("Be brief.", "Go.", "at 2")
    assert assistant["reasoning_content"] == "Two?"
    assert assistant["tool_calls"][0]["function"]["name"] == "move"
    merged, *rest = play("Dialogue", system_prompt_template="{tools}")[0].messages
    assert merged["content"].endswith("\n\nBe brief.")
    assert rest == [user, assistant, result]


def test_rows_of_another_kind_are_refused(play):
    with pytest.raises(DataError, match="names no OpenReward task: its metadata has no server_name, environment_name"):
        play("Counter", metadata={"task_spec": {}})


def test_images_are_refused(play):
    with pytest.raises(DataError, match="image"):
        play("Picture")


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("goal", "said"), [(1, "no room"), (2, "no sandbox"), (3, "the floor gave way")])
def test_what_breaks_in_the_environment_is_said_and_its_session_ends(play, goal, said):
    with pytest.raises(SessionError, match=said):
        play("Failing", turn(call("move", by=1)), goal=goal)


def test_a_server_that_is_not_there(worlds):
    async def main():
        made = OpenReward(OpenRewardOptions(base_url="http://127.0.0.1:9"))
        try:
            await made.reset(Prompt("set:0", "set", metadata=worlds.row("Counter")))
        finally:
            await made.close()

    with pytest.raises(SessionError, match="127.0.0.1:9"):
        asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.fixture
def floor_key(monkeypatch):
    monkeypatch.setenv("FLOOR_KEY", "open-sesame-17")
    return "open-sesame-17"


def test_secrets_reach_the_environment_and_nothing_that_it_says_of_them_comes_back(play, floor_key):
    _, (step,) = play("Gossip", turn(call("tell")), secrets=("floor_key",))
    assert "[floor_key]" in step.messages[0]["content"]
    assert floor_key not in repr(step)


@pytest.mark.parametrize("key", ["open-\\sesame\\17", 'open-"sesame"-17', "open-'sesame'-\"17\"", "öffne-sesam-17"])
@pytest.mark.parametrize("quote", [str, repr, ascii, json.dumps])
def test_a_secret_is_struck_out_however_it_is_quoted(monkeypatch, key, quote):
    monkeypatch.setenv("FLOOR_KEY", key)
    environment = OpenReward(OpenRewardOptions(base_url="http://127.0.0.1:9", secrets=("floor_key",)))
    hidden = environment._hide(f"the key {quote(key)} is wrong")
    assert re.fullmatch(r"the key [\"']?\[floor_key\][\"']? is wrong", hidden)


def test_tools_and_their_descriptions_hold_no_secret(play, floor_key):
    (tool,) = play("Labelled", secrets=("floor_key",))[0].tools
    assert tool["function"]["description"] == "Ask with [floor_key]."
    assert tool["function"]["parameters"]["properties"]["key"]["description"] == "Such as [floor_key]."
    listed, _ = play("Labelled", secrets=("floor_key",), system_prompt_template="{tools}")
    assert "Ask with [floor_key]." in listed.messages[0]["content"]
    assert floor_key not in f"{tool}{listed}"


def test_a_secret_that_begins_with_another_is_struck_out_as_a_whole(play, floor_key, monkeypatch):
    monkeypatch.setenv("CELLAR_KEY", f"{floor_key}-and-more")
    _, (step,) = play("Gossip", turn(call("tell")), secrets=("floor_key", "cellar_key"))
    assert "[cellar_key]" in step.messages[0]["content"]
    assert "and-more" not in repr(step)


def test_errors_do_not_spell_secrets(play, floor_key):
    with pytest.raises(SessionError, match=r"the key was \[floor_key\]") as caught:
        play("Failing", turn(call("move", by=1)), secrets=("floor_key",))
    assert floor_key not in repr(caught.value)


def test_a_server_of_ones_own_is_not_told_the_key_of_the_account(play, monkeypatch):
    monkeypatch.setenv("OPENREWARD_API_KEY", "sk-of-the-account")
    monkeypatch.setattr(OpenReward, "_hide", lambda self, text: text)
    _, (step,) = play("Gossip", turn(call("tell")))
    assert "sk-of-the-account" not in step.messages[0]["content"]


def test_a_hosted_environment_is_told_the_key_and_does_not_give_it_away(play, url, worlds, monkeypatch):
    """The way to openreward.ai, with the SDK's own variable for another address at its end."""
    monkeypatch.setenv("OPENREWARD_API_KEY", "sk-of-the-account")
    monkeypatch.setenv("OPENREWARD_SESSION_URL", url)
    row = worlds.row("Gossip", namespace="General", variant="gossip")
    _, (step,) = play("Gossip", turn(call("tell")), metadata=row, base_url=None)
    assert "'OPENREWARD_API_KEY': '[OPENREWARD_API_KEY]'" in step.messages[0]["content"]
    assert "sk-of-the-account" not in repr(step)


@pytest.mark.parametrize("option", ["secrets", "secret"])
def test_secrets_of_a_task_set_are_names_and_values_are_not_repeated(option):
    _, (fault,) = read_options(OpenRewardOptions, {option: {"floor_key": "open-sesame-17"}})
    assert re.match(f"{option}=<class 'dict'>: (must be a list|unknown option; did you mean 'secrets')", str(fault))


def test_a_run_whose_secrets_are_missing_is_refused_before_it_begins(monkeypatch):
    def check(base_url="http://127.0.0.1:9", **options):
        read, _ = read_options(OpenRewardOptions, {"base_url": base_url, **options})
        read.preflight()

    check()
    with pytest.raises(ConfigError, match="set floor_key"):
        check(secrets=["floor_key"])
    monkeypatch.setenv("FLOOR_KEY", "x")
    check(secrets=["floor_key"])
    with pytest.raises(
        ConfigError, match=r"is to get the trajectories \(run_name\), and OPENREWARD_API_KEY is not set"
    ):
        check(run_name="mine")
    with pytest.raises(ConfigError, match="hosts the environments .* OPENREWARD_API_KEY is not set"):
        check(base_url=None)
    monkeypatch.setenv("OPENREWARD_API_KEY", "sk-of-the-account")
    check(base_url=None, run_name="mine")
