"""The contracts of rewards and of sample filters."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from miles.conformance import judgement
from miles.protocols import Score
from miles.testing.contract import ComponentContract
from miles.types import Group, Prompt, Sample, Status, Turn, Verdict

MALFORMED = {
    "nothing": "",
    "white space": " \n\t ",
    "no answer": "I do not know.",
    "cut off": "The answer is \\boxed{4",
    "nested": "\\boxed{" * 40 + "1" + "}" * 40,
    "half a character": "\ud800",
    "zero bytes": "\x00\x00",
    "other scripts": "答えは四十二です。 ٤٢ 🧮",
    "broken JSON": '<tool_call>{"name": "f", "arguments": {</tool_call>',
    "a huge number": "9" * 5000,
    "a loop": "wait, " * 20_000,
}
"""What models say before they have learnt anything, and sometimes after."""


def scored(score: Score) -> dict[str, float]:
    """A score as named parts, of which `reward` is the scalar."""
    return dict(score) if isinstance(score, Mapping) else {"reward": score}


class RewardContract(ComponentContract):
    """`score(sample)`, `score_group(group)`, or a function of a sample.

    Example:
        class TestExactMatch(RewardContract):
            name = "exact_match"
            cases = [("42", "42", 1.0), ("43", "42", 0.0)]
    """

    kind = "rewards"
    cases: ClassVar[Sequence[tuple[str, Any, float]]] = ()
    """Response, label, and the reward it must get."""
    label: ClassVar[Any] = "42"
    """Of the prompts whose answers are malformed."""
    seconds: ClassVar[float] = 30.0
    """A malformed answer must be judged within this time."""

    def sample(self, text: str, label: Any, id: int = 0) -> Sample:
        """A finished sample. Override it for a reward that reads more of one than text and label."""
        prompt = Prompt(f"contract:{id}", "contract", text="?", label=label, tokens=[1, 2])
        sample = Sample.begin(prompt, id=id, group_id=0)
        sample.append([3] * max(len(text), 1), {})
        sample.turns = [Turn(2, len(sample.tokens), "stop", reward=0.5)]
        sample.text, sample.status = text, Status.COMPLETED
        return sample

    async def judge(self, reward: Any, samples: Sequence[Sample]) -> list[dict[str, float]]:
        """Scores of samples that answer one prompt, as the core asks for them: all at once."""
        name, method = judgement(reward)
        if name == "score_group":
            return [scored(s) for s in await self._call(method, Group(0, samples[0].prompt, list(samples)))]
        return [scored(s) for s in await asyncio.gather(*(self._call(method, sample) for sample in samples))]

    async def _call(self, method: Any, judged: Sample | Group) -> Any:
        """What is synchronous runs in a thread, as in a run."""
        if inspect.iscoroutinefunction(method) or inspect.iscoroutinefunction(type(method).__call__):
            return await method(judged)
        return await asyncio.to_thread(method, judged)

    def scores(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        return asyncio.run(self.judge(self.build(), samples))

    def test_known_answers_get_their_reward(self) -> None:
        """The author's own examples: what the reward is for."""
        if not self.cases:
            pytest.skip("no `cases` are given, so nothing says which answers are right")
        for text, label, expected in self.cases:
            (score,) = self.scores([self.sample(text, label)])
            assert math.isclose(score["reward"], expected, abs_tol=1e-6), f"{text!r} for {label!r}"

    def test_a_score_is_finite_numbers(self) -> None:
        """A float, or named floats among which `reward` is the scalar. NaN would stop the run."""
        samples = [self.sample(text, self.label, i) for i, text in enumerate(MALFORMED.values())]
        for text, score in zip(MALFORMED, self.scores(samples), strict=True):
            assert "reward" in score, f"{text}: a mapping needs the key 'reward', got {sorted(score)}"
            for name, value in score.items():
                assert isinstance(value, int | float), f"{text}: {name} is a {type(value).__name__}"
                assert math.isfinite(value), f"{text}: {name} is {value}"

    def test_a_malformed_answer_is_a_score_not_an_exception(self) -> None:
        """The policy says anything; an exception costs the sample, and enough of them the run."""
        reward = self.build()
        for what, text in MALFORMED.items():
            started = time.perf_counter()
            try:
                asyncio.run(self.judge(reward, [self.sample(text, self.label)]))
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            assert time.perf_counter() - started < self.seconds, f"{what} took more than {self.seconds} s"

    def test_the_same_answer_gets_the_same_reward(self) -> None:
        """Noise in the reward is noise in every gradient, and a run could not be repeated."""
        texts = [text for text, _, _ in self.cases] or ["42", "no"]
        samples = [self.sample(text, self.label, i) for i, text in enumerate(texts)]
        assert self.scores(samples) == self.scores(copy.deepcopy(samples))

    def test_many_at_once_as_one_by_one(self) -> None:
        """Rewards of a whole batch are asked for at the same time, of one object. (A group is judged as one.)"""
        reward = self.build()
        texts = [text for text, _, _ in self.cases] or ["42", "no"]
        groups = [[self.sample(text, self.label, i)] for i, text in enumerate(texts * 8)]
        one_by_one = [asyncio.run(self.judge(self.build(), group)) for group in groups[: len(texts)]] * 8

        async def at_once() -> list[Any]:
            return await asyncio.gather(*(self.judge(reward, group) for group in groups))

        assert asyncio.run(at_once()) == one_by_one

    def test_the_sample_is_left_alone(self) -> None:
        """Tokens, columns and text are what is trained on; the score is what a reward has to say."""
        sample = self.sample("42", self.label)
        before = copy.deepcopy(sample)
        self.scores([sample])
        assert (sample.tokens, sample.text, sample.messages) == (before.tokens, before.text, before.messages)
        assert sample.columns.keys() == before.columns.keys()
        assert all((sample.columns[name] == before.columns[name]).all() for name in sample.columns)
        assert (sample.reward, sample.status) == (before.reward, before.status)


class SampleFilterContract(ComponentContract):
    """`(group) -> Verdict`.

    Example:
        class TestAgreeingRewards(SampleFilterContract):
            name = "agreeing_rewards"
            kept = [[1.0, 0.0]]
            dropped = [[1.0, 1.0]]
    """

    kind = "sample_filters"
    kept: ClassVar[Sequence[Sequence[float]]] = ()
    """Rewards of groups that must be kept."""
    dropped: ClassVar[Sequence[Sequence[float]]] = ()
    """Rewards of groups that must be dropped."""

    def group(self, rewards_G: Sequence[float | None]) -> Group:
        """A finished group; None is the reward of a failed sample. Override it for a filter that looks at more."""
        prompt = Prompt("contract:0", "contract", text="?", tokens=[1, 2])
        samples = [Sample.begin(prompt, id=i, group_id=7) for i in range(len(rewards_G))]
        for sample, reward in zip(samples, rewards_G, strict=True):
            sample.append([3, 4, 5], {})
            sample.reward = reward
            sample.status = Status.FAILED if reward is None else Status.COMPLETED
        return Group(7, prompt, samples)

    def verdict(self, rewards_G: Sequence[float | None]) -> Verdict:
        verdict = self.build()(self.group(rewards_G))
        assert isinstance(verdict, Verdict), f"returned {type(verdict).__name__}, not a Verdict"
        assert isinstance(verdict.keep, bool), f"keep is a {type(verdict.keep).__name__}"
        return verdict

    def test_known_groups_are_kept_or_dropped(self) -> None:
        """The author's own examples: what the filter is for."""
        if not (self.kept or self.dropped):
            pytest.skip("neither `kept` nor `dropped` is given, so nothing says which groups are wanted")
        assert [list(rewards) for rewards in self.kept if not self.verdict(rewards).keep] == []
        assert [list(rewards) for rewards in self.dropped if self.verdict(rewards).keep] == []

    def test_a_drop_has_a_reason(self) -> None:
        """Drops are counted by reason: without one nobody learns why a rollout took twice as long."""
        for rewards in (*self.dropped, [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]):
            verdict = self.verdict(rewards)
            if not verdict.keep:
                assert verdict.reason.strip(), f"dropped {list(rewards)} without a reason"
                assert not set(verdict.reason) & set(" /\n"), "the reason is part of a metric's name"

    def test_any_group_gets_a_verdict(self) -> None:
        """One sample, no sample, failed samples: such groups come, and an exception stops the run."""
        for rewards in ([], [1.0], [None, 1.0], [None, None], [-1e9, 1e9]):
            self.verdict(rewards)

    def test_the_group_is_left_alone(self) -> None:
        """A filter decides; `miles_modify_samples` is the hook that edits."""
        group = self.group([1.0, 0.0, None])
        before = copy.deepcopy(group)
        self.build()(group)
        assert [vars(s).keys() for s in group.samples] == [vars(s).keys() for s in before.samples]
        for name in ("tokens", "reward", "status", "metadata", "turns"):
            assert [getattr(s, name) for s in group.samples] == [getattr(s, name) for s in before.samples], name

    def test_the_same_group_gets_the_same_verdict(self) -> None:
        """A resumed run must keep the groups that the first one kept."""
        for rewards in (*self.kept, *self.dropped, [1.0, 0.0], [1.0, 1.0]):
            assert self.verdict(rewards) == self.verdict(rewards)
