"""Generate functions with an engine that plays back what the test wrote down."""

import asyncio
import inspect
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from miles.api import (
    Action,
    DataError,
    GenerateContext,
    GenerateResult,
    Observation,
    Prompt,
    Sample,
    SamplingParams,
    Status,
    StepResult,
    recorded_rows,
    routed_experts_column,
)
from miles.builtins.generate import ENVIRONMENT_STATE, RESTARTED, MultiTurn, dataset, single_turn

USER = {"role": "user", "content": "hello"}


@dataclass
class Script:
    """An engine: each answer is (text, finish reason); a stopped one ends with the end-of-turn token."""

    chat: object
    answers: list
    version: int = 3
    close_turns: bool = True
    routes: bool = False
    requests: list = field(default_factory=list)

    async def __call__(self, request):
        self.requests.append(request)
        text, reason = self.answers.pop(0)
        if isinstance(text, Exception):
            raise text
        tokens = self.chat.render_text(text)
        if reason == "stop" and self.close_turns:
            tokens = [*tokens, self.chat.stop_token_ids[0]]
        count = len(tokens)
        rows = len(request.tokens) + count - 1
        experts = np.full((rows, 2, 1), len(self.requests), "int32") if self.routes else None
        return GenerateResult(tokens, [-0.5] * count, reason, [self.version] * count, experts)


@dataclass
class Counting:
    """Answers every turn with its number, pays it, and is done after `turns` of them."""

    turns: int = 2
    seen: list = field(default_factory=list)
    closed: bool = False
    tools: tuple = ()
    opening: tuple = ()

    async def reset(self, prompt):
        return Observation(self.opening, self.tools)

    async def step(self, action):
        self.seen.append(action)
        count = len(self.seen)
        return StepResult(
            ({"role": "tool", "content": str(count)},), float(count), count >= self.turns, {"steps": count}
        )

    async def close(self):
        self.closed = True


class Resumable(Counting):
    def state_dict(self):
        return {"seen": len(self.seen)}

    def load_state_dict(self, state):
        self.seen = [Action("")] * state["seen"]


def context_of(engine, environment=None, **options):
    options = {"sampling": SamplingParams(max_new_tokens=40), **options}
    make = environment if environment is None or callable(environment) else lambda: environment
    return GenerateContext(engine, engine.chat, make_environment=make, **options)


def fresh(chat, **options):
    prompt = Prompt("set:0", "set", messages=[USER], tokens=chat.render_prompt([USER]), **options)
    return Sample.begin(prompt, id=5, group_id=1, seed=99)


def play(generate, context, sample):
    return asyncio.run(generate(context, sample))


# --------------------------------------------------------------------------------------------------------- single turn


def test_single_turn_records_tokens_and_columns(chat):
    engine = Script(chat, [("hello you", "stop")], routes=True)
    sample = play(single_turn, context_of(engine, routed_experts=True), fresh(chat))
    asked, said = sample.prompt_length, len(chat.render_text("hello you")) + 1
    assert sample.status is Status.COMPLETED
    assert sample.text == "hello you"
    assert sample.tokens[asked:] == [*chat.render_text("hello you"), chat.stop_token_ids[0]]
    assert sample.loss_mask.tolist() == [0] * asked + [1] * said
    assert sample.columns["rollout_log_probs"].tolist() == [0.0] * asked + [-0.5] * said
    assert sample.columns["weight_version"].tolist() == [-1] * asked + [3] * said
    assert sample.columns["rollout_routed_experts"].shape == (asked + said - 1, 2, 1)
    assert sample.messages[-1] == {"role": "assistant", "content": "hello you"}
    [turn] = sample.turns
    assert (turn.start, turn.end, turn.finish_reason) == (asked, asked + said, "stop")
    request = engine.requests[0]
    assert (request.seed, request.routed_experts, request.priority) == (99, True, -sample.group_id)


@pytest.mark.parametrize(("reason", "status"), [("length", Status.TRUNCATED), ("abort", Status.ABORTED)])
def test_single_turn_status(chat, reason, status):
    assert play(single_turn, context_of(Script(chat, [("he", reason)])), fresh(chat)).status is status


def test_the_context_limits_a_response(chat):
    sample = fresh(chat)
    engine = Script(chat, [("h", "length")])
    play(single_turn, context_of(engine, max_context_tokens=sample.prompt_length + 7), sample)
    assert engine.requests[0].sampling.max_new_tokens == 7


def test_a_prompt_that_fills_the_context_is_truncated_without_asking(chat):
    sample = fresh(chat)
    engine = Script(chat, [])
    play(single_turn, context_of(engine, max_context_tokens=sample.prompt_length), sample)
    assert sample.status is Status.TRUNCATED
    assert sample.response_length == 0


def test_an_aborted_response_goes_on_from_its_tokens(chat):
    engine = Script(chat, [("he", "abort"), ("llo", "stop")], routes=True)
    sampling = SamplingParams(max_new_tokens=20, min_new_tokens=5)
    context = context_of(engine, sampling=sampling, routed_experts=True)
    sample = play(single_turn, context, fresh(chat))
    assert sample.status is Status.ABORTED
    half = list(sample.tokens)
    engine.version = 4
    sample = play(single_turn, context, sample)
    assert sample.status is Status.COMPLETED
    assert engine.requests[1].tokens == half
    said = len(half) - sample.prompt_length
    assert engine.requests[1].sampling.max_new_tokens == 20 - said
    assert engine.requests[1].sampling.min_new_tokens == 5 - said
    assert sample.text == "hello"
    assert sample.columns["weight_version"][-1] == 4
    assert sample.columns["weight_version"][len(half) - 1] == 3
    # what the first pass routed stays; the pass at the last old token belongs to the second request
    routes = sample.columns["rollout_routed_experts"][:, 0, 0].tolist()
    assert routes == [1] * (len(half) - 1) + [2] * (len(sample.tokens) - len(half))
    [turn] = sample.turns
    assert (turn.start, turn.end, turn.finish_reason) == (sample.prompt_length, len(sample.tokens), "stop")


def test_a_prompt_without_tokens_is_an_error_that_says_what_to_do(chat):
    sample = Sample.begin(Prompt("set:0", "set", messages=[USER], tokens=[]), id=0, group_id=0)
    with pytest.raises(DataError, match="generate: dataset"):
        play(single_turn, context_of(Script(chat, [])), sample)


@pytest.mark.parametrize("recorded", [0, 1, 300, 2999])
def test_recorded_rows_are_found_from_the_end(recorded):
    sample = Sample.begin(Prompt("set:0", "set", tokens=[1] * 3000), id=0, group_id=0)
    assert recorded_rows(sample) == 0
    column = routed_experts_column(2, 1, 8)
    sample.declare(column)
    sample.write(column, 0, np.zeros((recorded, 2, 1)))
    assert recorded_rows(sample) == recorded
    if recorded > 1:
        sample.write(column, 0, column.filled(recorded - 1))  # a gap before the last one is final
        assert recorded_rows(sample) == recorded


# ---------------------------------------------------------------------------------------------------------- multi-turn


def test_multi_turn_is_token_in_token_out(chat):
    call = 'one\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call><tool_call>{"name": "b"}</tool_call>'
    engine, environment = Script(chat, [(call, "stop"), ("hello", "stop")], routes=True), Counting()
    sample = play(MultiTurn(), context_of(engine, environment, routed_experts=True), fresh(chat))
    end = chat.stop_token_ids[0]
    first, second = [*chat.render_text(call), end], [*chat.render_text("hello"), end]
    between = chat.render_next([{"role": "tool", "content": "1"}])
    assert sample.tokens == chat.render_prompt([USER]) + first + between + second
    assert engine.requests[1].tokens == sample.tokens[: -len(second)]
    expected = [0] * sample.prompt_length + [1] * len(first) + [0] * len(between) + [1] * len(second)
    assert sample.loss_mask.tolist() == expected
    assert sample.columns["rollout_log_probs"].tolist() == [-0.5 * m for m in expected]
    routes = sample.columns["rollout_routed_experts"][:, 0, 0].tolist()
    recorded_first = sample.prompt_length + len(first) - 1
    assert routes == [1] * recorded_first + [2] * (len(sample.tokens) - 1 - recorded_first)
    assert sample.status is Status.COMPLETED
    assert [turn.reward for turn in sample.turns] == [1.0, 2.0]
    assert sample.metadata["environment"] == {"steps": 2}
    assert [c.name for c in environment.seen[0].tool_calls] == ["a", "b"]
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "tool", "assistant", "tool"]
    assert environment.closed


def test_the_environment_says_what_is_asked(chat):
    opening = ({"role": "system", "content": "count"}, USER)
    tools = ({"type": "function", "function": {"name": "add"}},)
    samples, generate = [fresh(chat), fresh(chat)], MultiTurn()
    for sample in samples:
        environment = Counting(1, tools=tools, opening=opening)
        play(generate, context_of(Script(chat, [("hello", "stop")]), environment), sample)
    expected = chat.render_prompt(opening, tools)
    for sample in samples:
        assert sample.tokens[: sample.prompt_length] == expected
        assert sample.loss_mask.sum() == 2
        assert sample.messages[:2] == list(opening)


@pytest.mark.parametrize(
    ("options", "turns"), [({"max_turns": 2}, 2), ({"max_context_tokens": 43}, 1)], ids=["turns", "context"]
)
def test_limits_truncate(chat, options, turns):
    engine = Script(chat, [("hello", "stop")] * 9)
    sample = play(MultiTurn(), context_of(engine, Counting(9), **options), fresh(chat))
    assert sample.status is Status.TRUNCATED
    assert len(sample.turns) == turns
    assert sample.loss_mask[-1] == 1


def test_a_turn_cut_by_its_length_is_seen_by_the_environment_and_ends_the_trajectory(chat):
    environment = Counting(9)
    sample = play(MultiTurn(), context_of(Script(chat, [("hell", "length")]), environment), fresh(chat))
    assert sample.status is Status.TRUNCATED
    assert environment.seen[0].finish_reason == "length"
    assert sample.turns[0].reward == 1.0


def test_a_turn_that_stopped_without_its_end_token_is_closed_by_us(chat):
    engine = Script(chat, [("hello", "stop"), ("hello", "stop")], close_turns=False)
    sample = play(MultiTurn(), context_of(engine, Counting()), fresh(chat))
    after = sample.turns[0].end
    assert sample.tokens[after] == chat.end_of_turn_id
    assert sample.loss_mask[after] == 0


def test_another_stop_token_than_the_end_of_a_turn_does_not_close_it(chat):
    engine = Script(chat, [("hello<|endoftext|>", "stop"), ("hello", "stop")], close_turns=False)
    sample = play(MultiTurn(), context_of(engine, Counting()), fresh(chat))
    after = sample.turns[0].end
    assert sample.tokens[after - 1] == chat.tokenizer.eos_token_id != chat.end_of_turn_id
    assert sample.tokens[after - 1] in chat.stop_token_ids
    assert sample.tokens[after] == chat.end_of_turn_id


class Inline(Counting):
    """Says its number within the model's turn, and ends turns at a tag of its own."""

    stop = ("</ask>", "END")

    async def step(self, action):
        step = await super().step(action)
        return replace(step, messages=({"role": "user", "content": f"[{len(self.seen)}]"},), inline=True)


def test_text_within_the_models_turn(chat):
    engine = Script(chat, [("hello</ask>", "stop"), ("hello</ask>", "stop")], close_turns=False)
    sample = play(MultiTurn(), context_of(engine, Inline()), fresh(chat))
    first, between = chat.render_text("hello</ask>"), chat.render_text("[1]")
    assert sample.tokens == chat.render_prompt([USER]) + first + between + first
    assert sample.loss_mask[sample.prompt_length :].tolist() == [1] * len(first) + [0] * len(between) + [1] * len(first)
    assert sample.text == "hello</ask>[1]hello</ask>"
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_a_turn_that_the_model_ended_does_not_go_on(chat, end):
    engine = Script(chat, [(f"hello{end}", "stop"), ("hello", "stop")], close_turns=False)
    sample = play(MultiTurn(), context_of(engine, Inline()), fresh(chat))
    after, closed = sample.turns[0].end, end == "<|im_end|>"
    assert sample.tokens[after : sample.turns[1].start] == chat.render_next(
        [{"role": "user", "content": "[1]"}], closed
    )


def test_without_a_template_there_are_no_turns_to_end(chat_with):
    chat = chat_with(None)
    engine = Script(chat, [("hello<|endoftext|>", "stop"), ("hello", "stop")], close_turns=False)
    prompt = Prompt("set:0", "set", text="hello", tokens=chat.render_text("hello"))
    sample = play(MultiTurn(), context_of(engine, Inline()), Sample.begin(prompt, id=5, group_id=1))
    assert sample.tokens[sample.turns[0].end : sample.turns[1].start] == chat.render_text("[1]")


def test_an_environment_ends_turns_at_strings_of_its_own(chat):
    engine = Script(chat, [("hello</ask>", "stop")] * 4, close_turns=False)
    context = context_of(engine, Inline, sampling=SamplingParams(stop=("END", "\n\n")))
    play(MultiTurn(), context, fresh(chat))
    assert {request.sampling.stop for request in engine.requests} == {("END", "\n\n", "</ask>")}
    play(MultiTurn(), replace(context, make_environment=Counting), fresh(chat))
    assert engine.requests[-1].sampling.stop == ("END", "\n\n")


class Broken(Counting):
    async def step(self, action):
        raise KeyError("no such file")


class BrokenAtTheEnd(Counting):
    async def close(self):
        raise OSError("socket gone")


def test_a_fault_of_the_environment_is_data(chat):
    environment = Broken()
    sample = play(MultiTurn(), context_of(Script(chat, [("hello", "stop")]), environment), fresh(chat))
    assert sample.status is Status.FAILED
    raised = inspect.getsourcelines(Broken.step)[1] + 1
    assert sample.error == (
        f"environment Broken ({__file__}:{raised - 2}): KeyError: 'no such file' ({__file__}:{raised})"
    )
    assert environment.closed


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("reset", "hello", "`reset` returned str 'hello'; a miles.api.Observation is expected"),
        ("reset", None, "`reset` returned NoneType None; a miles.api.Observation is expected"),
        (
            "reset",
            Observation("hello"),
            "`reset` returned Observation(messages=str 'hello'); a tuple is expected, each",
        ),
        ("reset", Observation(({"content": "hello"},)), "each item a mapping: a message with a role"),
        ("reset", Observation((), ("add",)), "`reset` returned Observation(tools=tuple ('add',)); a tuple is expected"),
        ("step", ("well", 1.0), "`step` returned tuple ('well', 1.0); a miles.api.StepResult is expected"),
        ("step", StepResult(USER), "`step` returned StepResult(messages=dict"),
        ("step", StepResult(reward="1"), "`step` returned reward=str '1'; a finite number or None is expected"),
        ("step", StepResult(reward=float("nan")), "`step` returned reward=float nan; a finite number or None"),
        ("step", StepResult(reward=np.array([1.0, 2.0])), "`step` returned reward=ndarray array([1., 2.]); a finite"),
        ("step", StepResult(reward=10**400), "`step` returned reward=int 1000"),
    ],
)
def test_what_an_environment_returns_in_place_of_what_is_expected(chat, method, answer, message):
    class Odd(Counting):
        pass

    async def odd(self, _):
        return answer

    setattr(Odd, method, odd)
    environment = Odd()
    sample = play(MultiTurn(), context_of(Script(chat, [("hello", "stop")]), environment), fresh(chat))
    assert sample.status is Status.FAILED
    assert sample.error.startswith(f"environment {Odd.__qualname__} ({__file__}:{inspect.getsourcelines(Odd)[1]}): ")
    assert message in sample.error
    assert environment.closed


def test_a_fault_while_closing_keeps_the_trajectory(chat, caplog):
    sample = play(MultiTurn(), context_of(Script(chat, [("hello", "stop")]), BrokenAtTheEnd(1)), fresh(chat))
    assert sample.status is Status.COMPLETED
    assert "socket gone" in caplog.text


def test_a_fault_of_the_engine_is_not_the_environments(chat):
    environment = Counting()
    with pytest.raises(RuntimeError, match="engine down"):
        play(MultiTurn(), context_of(Script(chat, [(RuntimeError("engine down"), "")]), environment), fresh(chat))
    assert environment.closed


def test_an_aborted_trajectory_resumes_with_its_environments_state(chat):
    answers = [("one", "stop"), ("he", "abort"), ("llo", "stop")]
    engine = Script(chat, list(answers))
    context = context_of(engine, Resumable)
    sample = play(MultiTurn(), context, fresh(chat))
    assert sample.status is Status.ABORTED
    assert sample.metadata[ENVIRONMENT_STATE] == {"seen": 1}
    sample = play(MultiTurn(), context, sample)
    unbroken = play(MultiTurn(), context_of(Script(chat, [("one", "stop"), ("hello", "stop")]), Resumable), fresh(chat))
    assert sample.status is Status.COMPLETED
    assert sample.text == unbroken.text
    assert sample.messages == unbroken.messages
    assert [turn.reward for turn in sample.turns] == [1.0, 2.0]
    assert RESTARTED not in sample.metadata
    assert ENVIRONMENT_STATE not in sample.metadata


def test_without_a_state_an_aborted_trajectory_begins_again(chat):
    engine = Script(chat, [("one", "stop"), ("he", "abort"), ("one", "stop"), ("two", "stop")])
    context = context_of(engine, Counting)
    sample = play(MultiTurn(), context, play(MultiTurn(), context, fresh(chat)))
    assert sample.status is Status.COMPLETED
    assert engine.requests[2].tokens == chat.render_prompt([USER])
    assert len(sample.turns) == 2
    assert sample.metadata[RESTARTED] == 1
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "tool", "assistant", "tool"]


# ----------------------------------------------------------------------------------------------------------------- SFT


def test_dataset_trains_on_the_label_and_its_end(chat):
    sample = play(dataset, context_of(Script(chat, [])), fresh(chat, label=42))
    assert sample.tokens[sample.prompt_length :] == [*chat.render_text("42"), chat.stop_token_ids[0]]
    assert sample.prompt_length == len(chat.render_prompt([USER]))
    assert sample.loss_mask.tolist() == [0] * sample.prompt_length + [1, 1, 1]
    assert (sample.status, sample.text) == (Status.COMPLETED, "42")


def test_dataset_trains_on_every_turn_of_a_conversation(chat):
    messages = [USER, {"role": "assistant", "content": "hello"}, USER, {"role": "assistant", "content": "two"}]
    sample = Sample.begin(Prompt("set:0", "set", messages=messages, tokens=[]), id=0, group_id=0)
    sample = play(dataset, context_of(Script(chat, [])), sample)
    tokens, mask = chat.render_conversation(messages)
    assert sample.tokens == tokens
    assert sample.loss_mask.tolist() == mask
    assert sample.prompt_length == len(chat.render_prompt([USER]))


def test_dataset_cuts_at_the_context(chat):
    sample = fresh(chat, label="hello hello hello")
    limit = sample.prompt_length + 2
    sample = play(dataset, context_of(Script(chat, []), max_context_tokens=limit), sample)
    assert sample.status is Status.TRUNCATED
    assert len(sample.tokens) == limit


def test_dataset_without_a_response_is_an_error(chat):
    with pytest.raises(DataError, match="no response to train on"):
        play(dataset, context_of(Script(chat, [])), fresh(chat))
