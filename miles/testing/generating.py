"""The contract of generate functions, and the engine and the environment that play back what is written for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest

from miles.contexts import GenerateContext
from miles.protocols import ChatFormat
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.types import (
    Action,
    GenerateRequest,
    GenerateResult,
    Observation,
    Prompt,
    Sample,
    SamplingParams,
    Status,
    StepResult,
)

ENDED = (Status.COMPLETED, Status.TRUNCATED, Status.ABORTED, Status.FAILED)
VERSION = 3
ID, GROUP, SEED = 5, 1, 99


@dataclass
class Script:
    """An engine that says what is written: (text, finish reason), the last one again and again. Log-probabilities
    count down, so that a column that slips by a token is seen."""

    chat: ChatFormat
    answers: Sequence[tuple[str, Any]] = (("hello", "stop"),)
    requests: list[GenerateRequest] = field(default_factory=list)
    said: list[tuple[int, int, float]] = field(default_factory=list)
    """Place in the stream, token and log-probability of everything it produced."""
    broken: bool = False

    async def __call__(self, request: GenerateRequest) -> GenerateResult:
        await asyncio.sleep(0)
        if self.broken:
            raise ConnectionError("the engine is gone")
        text, reason = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(request)
        tokens = self.chat.render_text(text)
        if reason == "stop" and self.chat.stop_token_ids:
            tokens = [*tokens, self.chat.stop_token_ids[0]]
        room = request.sampling.max_new_tokens
        if len(tokens) > room:
            tokens, reason = tokens[:room], "length"
        log_probs = [-0.25 * (1 + len(self.said) + i) for i in range(len(tokens))]
        start = len(request.tokens)
        self.said += [(start + i, token, log_probs[i]) for i, token in enumerate(tokens)]
        return GenerateResult(tokens, log_probs, reason, [VERSION] * len(tokens))


class Echo:
    """An environment that repeats what it hears, pays 0.5 a turn, and ends after two."""

    def __init__(self) -> None:
        self.turns = 0

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(({"role": "user", "content": "go on"},))

    async def step(self, action: Action) -> StepResult:
        self.turns += 1
        return StepResult(({"role": "user", "content": action.text},), 0.5, self.turns >= 2)

    async def close(self) -> None:
        self.turns = 0


class GenerateFunctionContract(ComponentContract):
    """`async (context, sample) -> Sample`, or siblings.

    Example:
        class TestSingleTurn(GenerateFunctionContract):
            name = "single_turn"
    """

    kind = "generate_functions"
    trains: ClassVar[str] = "answers"
    """What the loss mask covers: `answers` of the engine, or the data's own `responses` (SFT: no engine is asked)."""

    def prompt(self, chat: ChatFormat) -> Prompt:
        """What is asked. Override it for a function that reads more of a prompt."""
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        tokens = chat.render_prompt(messages)
        return Prompt("contract:0", "contract", messages=messages, label="hello you", tokens=tokens)

    def finish(self, script: Script, environment: Callable[[], Any] = Echo, **context: Any) -> list[Sample]:
        """A fresh sample through the function."""
        prompt = self.prompt(script.chat)
        sample = Sample.begin(prompt, id=ID, group_id=GROUP, seed=SEED)
        given: dict[str, Any] = {
            "generate": script,
            "chat": script.chat,
            "sampling": SamplingParams(max_new_tokens=64, stop_token_ids=tuple(script.chat.stop_token_ids)),
            "make_environment": environment,
            **context,
        }
        result = asyncio.run(self.build()(GenerateContext(**given), sample))
        return result if isinstance(result, list) else [result]

    def script(self, *answers: tuple[str, str]) -> Script:
        return Script(tiny.chat_format(installed()), answers or (("hello you", "stop"),))

    def test_a_finished_sample(self) -> None:
        """It has tokens, an end, a decoded response, and turns that lie within it, one after the other."""
        samples = self.finish(self.script())
        assert samples, "no sample came out"
        for sample in samples:
            assert sample.status in (Status.COMPLETED, Status.TRUNCATED), f"{sample.status}: {sample.error}"
            assert sample.text, "the response is not decoded: rewards read `text`"
            assert sample.response_length > 0
            assert sample.turns, "no turn is recorded: statistics and environment rewards read them"
            ends = [sample.prompt_length, *(place for turn in sample.turns for place in (turn.start, turn.end))]
            assert all(a <= b for a, b in pairwise(ends)), f"turns overlap: {ends}"
            assert ends[-1] <= len(sample.tokens)

    def test_columns_are_aligned(self) -> None:
        """Entry `t` of a column speaks of token `t`: one place off, and the run trains on other numbers."""
        script = self.script()
        for sample in self.finish(script):
            for name, column in sample.columns.items():
                rows = sample.specs[name].rows(len(sample.tokens))
                assert len(column) == rows, f"{name} has {len(column)} rows for {len(sample.tokens)} tokens"
            if self.trains == "answers":
                told = sample.columns["rollout_log_probs"]
                heard = [(t, sample.tokens[t], float(told[t])) for t in range(len(told)) if sample.loss_mask[t]]
                unheard = [entry for entry in heard if entry not in script.said]
                assert unheard == [], "(place, token, log-prob) that no engine produced"

    def test_only_what_the_model_said_is_trained(self) -> None:
        """Prompt and environment tokens have mask 0; the weight version tells who produced a token."""
        script = self.script()
        samples = self.finish(script)
        trained = sum(sample.trainable_tokens for sample in samples)
        assert trained > 0, "nothing is trained"
        for sample in samples:
            assert not sample.loss_mask[: sample.prompt_length].any(), "the prompt is trained on"
            if self.trains == "answers":
                versions = sample.columns["weight_version"]
                assert (versions[sample.loss_mask > 0] == VERSION).all()
                assert (versions[sample.loss_mask == 0] == -1).all()
        assert self.trains == "responses" or trained <= len(script.said), "more is trained than was said"

    def test_tokens_are_never_tokenised_again(self) -> None:
        """What was generated stays in the stream as it was, and every request continues the one before: tokens of a
        decoded and re-encoded text are others, with log-probs of tokens that were never drawn."""
        script = self.script(("hell", "stop"), ("o", "stop"))
        samples = self.finish(script)
        for sample in samples:
            for request in script.requests:
                seen = sample.tokens[: len(request.tokens)]
                assert seen == request.tokens or len(samples) > 1, "a request is no prefix of the finished stream"

    def test_an_answer_that_was_cut_is_truncated(self) -> None:
        """Truncated samples are counted, and masked or dropped by option: the status must say so."""
        if self.trains == "responses":
            pytest.skip("asks no engine")
        samples = self.finish(self.script(("hello you", "length")))
        assert {sample.status for sample in samples} == {Status.TRUNCATED}

    def test_an_aborted_answer_is_aborted_and_goes_on(self) -> None:
        """An abort comes in the middle of anything; what was generated is kept and continued, or begun again."""
        if self.trains == "responses":
            pytest.skip("asks no engine")
        script = self.script(("hel", "abort"), ("lo", "stop"))
        sample, *_ = self.finish(script)
        assert sample.status is Status.ABORTED
        context = GenerateContext(
            script, script.chat, SamplingParams(max_new_tokens=64, stop_token_ids=script.chat.stop_token_ids), Echo
        )
        result = asyncio.run(self.build()(context, sample))
        for resumed in result if isinstance(result, list) else [result]:
            assert resumed.status is Status.COMPLETED
            assert all(
                len(column) == resumed.specs[name].rows(len(resumed.tokens)) for name, column in resumed.columns.items()
            )

    def test_the_context_is_not_exceeded(self) -> None:
        """The engine refuses a sequence that is too long, and the trainer's memory was measured for the limit."""
        asked = min(sample.prompt_length for sample in self.finish(self.script()))
        for room in (0, 1, 3):
            limit = asked + room
            for sample in self.finish(self.script(), max_context_tokens=limit):
                assert len(sample.tokens) <= limit, f"{len(sample.tokens)} tokens within a context of {limit}"
                assert sample.status in (Status.TRUNCATED, Status.FAILED), f"cut off, but {sample.status}"

    def test_siblings_share_their_trajectory(self) -> None:
        """Samples cut from one trajectory count once in every average: they say so by their `rollout_id`."""
        samples = self.finish(self.script())
        assert {sample.rollout_id for sample in samples} == {ID}
        assert {sample.group_id for sample in samples} == {GROUP}

    def test_the_samples_seed_decides_its_draws(self) -> None:
        """Siblings of a group must differ, and a repeated run must not."""
        script = self.script()
        self.finish(script)
        assert {request.seed for request in script.requests} <= {SEED}, "requests do not carry the sample's seed"
        assert all(request.sampling.max_new_tokens <= 64 for request in script.requests)

    def test_a_broken_engine_is_no_sample(self) -> None:
        """It raises, or returns FAILED with the error: a made-up answer would be trained on."""
        if self.trains == "responses":
            pytest.skip("asks no engine")
        script = self.script()
        script.broken = True
        try:
            samples = self.finish(script)
        except ConnectionError:
            return
        for sample in samples:
            assert sample.status is Status.FAILED
            assert "the engine is gone" in (sample.error or "")

    def test_many_at_once_do_not_meet(self) -> None:
        """One object serves a whole batch of samples, which are all under way together."""
        function, chat = self.build(), tiny.chat_format(installed())
        texts = ["hello", "you", "hello hello", "he"]

        async def one(i: int, text: str) -> list[int]:
            script = Script(chat, [(text, "stop")])
            sample = Sample.begin(self.prompt(chat), id=i, group_id=1, seed=i)
            sampling = SamplingParams(max_new_tokens=64, stop_token_ids=tuple(chat.stop_token_ids))
            result = await function(GenerateContext(script, chat, sampling, Echo), sample)
            return [t for s in (result if isinstance(result, list) else [result]) for t in s.tokens]

        async def together() -> list[list[int]]:
            return await asyncio.gather(*(one(i, text) for i, text in enumerate(texts)))

        assert asyncio.run(together()) == [asyncio.run(one(i, text)) for i, text in enumerate(texts)]
