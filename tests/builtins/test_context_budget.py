"""Limits of a trajectory: tokens of a turn, tokens of the context, turns; kept to the token on every path."""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from miles.api import (
    Action,
    GenerateContext,
    GenerateResult,
    Observation,
    Prompt,
    Sample,
    SamplingParams,
    Status,
    StepResult,
)
from miles.builtins.generate import MultiTurn, opening
from miles.testing import tiny

USER = {"role": "user", "content": "hello"}
WORDS = "abcdefgh"
"""What every turn says, a token a letter; the end of the turn is the ninth."""


@dataclass
class Speller:
    """An engine that says the letters, as far as there is room."""

    chat: object
    asked: list = field(default_factory=list)

    async def __call__(self, request):
        self.asked.append((len(request.tokens), request.sampling.max_new_tokens))
        said = [*self.chat.render_text(WORDS), self.chat.end_of_turn_id]
        cut = said[: request.sampling.max_new_tokens]
        assert cut, "asked for no token"
        reason = "stop" if len(cut) == len(said) else "length"
        return GenerateResult(cut, [-1.0] * len(cut), reason, [1] * len(cut))


@dataclass
class Nodding:
    """Says the same after each turn, and is done after three."""

    answer: str = "go on"
    heard: list = field(default_factory=list)

    async def reset(self, prompt):
        return Observation(())

    async def step(self, action):
        self.heard.append(action)
        return StepResult(
            ({"role": "user", "content": self.answer},), np.float32(len(self.heard)), len(self.heard) == 3
        )

    async def close(self):
        """Nothing is held open."""


def play(chat, environment=None, sampling=None, **limits):
    engine, environment = Speller(chat), environment or Nodding()
    sampling = sampling or SamplingParams(max_new_tokens=20, stop_token_ids=chat.stop_token_ids)
    context = GenerateContext(engine, chat, sampling, make_environment=lambda: environment, **limits)
    prompt = Prompt("set:0", "set", messages=[USER], tokens=chat.render_prompt([USER]))
    sample = Sample.begin(prompt, id=1, group_id=1)
    return asyncio.run(MultiTurn()(context, sample)), engine, environment


def test_every_length_of_the_context(chat):
    """The stream is the unlimited one as far as the context reaches; the environment hears what was said in it."""
    whole, _, _ = play(chat)
    given = len(chat.render_next([{"role": "user", "content": "go on"}]))
    prompt, turn = whole.prompt_length, len(WORDS) + 1
    assert len(whole.tokens) == prompt + 3 * turn + 2 * given
    for limit in range(prompt + 1, len(whole.tokens) + 3):
        sample, engine, environment = play(chat, max_context_tokens=limit)
        used = limit - prompt
        turns = 1 + sum(used > i * (turn + given) for i in (1, 2))  # what is answered needs room for a token after it
        reaches = min(limit, prompt + turns * turn + (turns - 1) * given)
        assert sample.tokens == whole.tokens[:reaches], f"context of {limit}"
        assert sample.loss_mask[-1] == 1, "ends with what nobody answered"
        assert len(environment.heard) == turns == len(sample.turns)
        assert [turn.reward for turn in sample.turns] == [1.0, 2.0, 3.0][:turns]
        assert all(start + room <= limit for start, room in engine.asked)
        cut = reaches < prompt + turns * turn + (turns - 1) * given
        assert environment.heard[-1].finish_reason == ("length" if cut else "stop")
        assert sample.status is (Status.COMPLETED if turns == 3 and not cut else Status.TRUNCATED)


def test_rewards_of_turns_are_plain_numbers(chat):
    sample, _, _ = play(chat)
    assert [type(turn.reward) for turn in sample.turns] == [float] * 3


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_turns(chat, most):
    sample, _, environment = play(chat, max_turns=most)
    assert len(sample.turns) == len(environment.heard) == min(most, 3)
    assert sample.status is (Status.COMPLETED if most >= 3 else Status.TRUNCATED)
    assert sample.messages[-1]["content"] == "go on", "what the environment said last is among the messages"
    assert sample.tokens[-1] == chat.end_of_turn_id, "and not in the stream, where nobody answers it"


@pytest.mark.parametrize("most", [1, 8, 9])
def test_the_tokens_of_a_turn_are_limited_for_each_turn(chat, most):
    sampling = SamplingParams(max_new_tokens=most, stop_token_ids=chat.stop_token_ids)
    sample, engine, environment = play(chat, sampling=sampling)
    assert {room for _, room in engine.asked} == {most}
    if most < 9:
        assert (sample.status, len(sample.turns)) == (Status.TRUNCATED, 1)
        assert environment.heard[0].finish_reason == "length"
    else:
        assert sample.trainable_tokens == 27 > most


def test_what_an_environment_says_may_be_more_than_the_context_holds(chat):
    prompt = len(chat.render_prompt([USER]))
    sample, _, environment = play(chat, Nodding("and " * 500), max_context_tokens=prompt + 100)
    assert (sample.status, len(sample.turns), len(environment.heard)) == (Status.TRUNCATED, 1, 1)
    assert len(sample.tokens) == prompt + 9
    assert sample.turns[0].reward == 1.0


@pytest.mark.parametrize("room", [-5, 0, 1])
def test_a_first_observation_that_leaves_no_room(chat, room):
    class Verbose(Nodding):
        async def reset(self, prompt):
            return Observation(({"role": "user", "content": "how " * 50},))

    asked = len(chat.render_prompt([{"role": "user", "content": "how " * 50}]))
    sample, engine, environment = play(chat, Verbose(), max_context_tokens=asked + room)
    if room > 0:
        assert (sample.status, len(sample.tokens)) == (Status.TRUNCATED, asked + 1)
        return
    assert sample.status is Status.FAILED
    assert f"its first observation takes {asked} tokens" in sample.error
    assert f"a context of {asked + room} (rollout.max_context_len" in sample.error
    assert not engine.asked
    assert not environment.heard


def test_a_prompt_that_is_text_cannot_show_an_environments_tools(chat):
    class Offering(Nodding):
        async def reset(self, prompt):
            return Observation((), ({"type": "function", "function": {"name": "add"}},))

    context = GenerateContext(Speller(chat), chat, SamplingParams(), make_environment=Offering)
    sample = Sample.begin(Prompt("set:0", "set", text="12 + 7?", tokens=chat.render_text("12 + 7?")), id=1, group_id=1)
    sample = asyncio.run(MultiTurn()(context, sample))
    assert sample.status is Status.FAILED
    assert "the prompt is text" in sample.error
    assert "apply_chat_template" in sample.error


def test_what_cannot_be_rendered_is_the_environments_fault(chat):
    sample, _, _ = play(chat, Nodding("half a pair: \ud800"))
    assert sample.status is Status.FAILED
    assert sample.error.startswith("environment Nodding")
    assert "what it said cannot be rendered" in sample.error


# ----------------------------------------------------------------------------------------------------------- reasoning

OPENED = tiny.CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


def test_thoughts_that_the_prompt_opened_are_no_answer_when_they_are_cut_off(chat_with):
    """And a call that is only thought of is not made."""
    for template, reasoning in ((tiny.CHATML, ""), (OPENED, "thinks")):
        chat = chat_with(template)

        async def think(request, chat=chat):
            tokens = chat.render_text('thinks<tool_call>{"name": "add"}</tool_call>')
            return GenerateResult(tokens, [-1.0] * len(tokens), "length", [1] * len(tokens))

        environment = Nodding()
        context = GenerateContext(think, chat, SamplingParams(), make_environment=lambda it=environment: it)
        prompt = Prompt("set:0", "set", messages=[USER], tokens=chat.render_prompt([USER]))
        asyncio.run(MultiTurn()(context, Sample.begin(prompt, id=1, group_id=1)))
        [action] = environment.heard
        if reasoning:
            assert action == Action("", 'thinks<tool_call>{"name": "add"}</tool_call>', (), "length")
        else:
            assert (action.text, action.tool_calls[0].name) == ("thinks", "add")


def test_the_end_of_a_prompt_that_opens_thoughts(chat_with):
    chat = chat_with()
    for text, expected in (
        ("assistant\n<think>\n", "<think>\n"),
        ("assistant\n<think>", "<think>"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
        ("<think> is a tag<|im_end|>\n", ""),
        ("assistant\n", ""),
        ("", ""),
    ):
        assert opening(chat, chat.render_text(text)) == chat.render_text(expected), text
    chat.markup = replace(chat.markup, reasoning=("[why]", "[/why]"))  # no token of its own
    for text, expected in (("so\n[why]\n", "[why]\n"), ("[why] not\n", ""), ("so\n", "")):
        assert opening(chat, chat.render_text(text)) == chat.render_text(expected), text
