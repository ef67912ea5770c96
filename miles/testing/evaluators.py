"""The contract of evaluators, on a site that answers from a script."""

from __future__ import annotations

import asyncio
import math
from typing import Any, ClassVar

import pytest

from miles.config import Config, TaskSet
from miles.protocols import ChatFormat
from miles.registry import Registry
from miles.rollout.engines import EngineFront
from miles.rollout.task import Task
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.testing.generating import Script
from miles.types import GenerateRequest, GenerateResult, Prompt, Sample

REWARD = "contract_reward"


class Scripted:
    """An engine front's engine: even prompts are answered rightly, odd ones wrongly."""

    generates = True

    def __init__(self, chat: ChatFormat, broken: bool):
        self.chat, self.broken = chat, broken
        self.seeds: list[int] = []

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.seeds.append(request.seed)
        even = int(self.chat.decode(request.tokens).split()[-1]) % 2 == 0
        return await Script(self.chat, [("right" if even else "wrong", "stop")], broken=self.broken)(request)


def judge(sample: Sample) -> float:
    return float("right" in sample.text)


class Site:
    """An `EvaluationSite` of two sets: of 4 prompts and of 1, half and all of which are answered rightly."""

    def __init__(self, broken: bool = False):
        names = {"half": 4, "all": 1}
        sets = [{"name": name, "path": "-", "reward": REWARD, "n_samples_per_prompt": 2} for name in names]
        self.registry = Registry(installed().plugins)
        self.registry.add("rewards", REWARD, judge)
        self.config = Config.model_validate({"eval": {"sets": sets}})
        self.sizes, self.chat = names, tiny.chat_format(installed())
        self.engine = Scripted(self.chat, broken)

    def load_prompts(self, task_set: TaskSet) -> list[Prompt]:
        texts = [f"hello {i}" for i in range(self.sizes[task_set.name])]
        return [
            Prompt(f"{task_set.name}:{i}", task_set.name, text=text, tokens=self.chat.render_text(text))
            for i, text in enumerate(texts)
        ]

    def eval_task(self, task_set: TaskSet) -> Task:
        front: Any = EngineFront([self.engine], 8)  # type: ignore[list-item]
        return Task(task_set, self.config, self.registry, front, self.chat, evaluation=True)


class EvaluatorContract(ComponentContract):
    """`async evaluate(site, step) -> set name -> metrics`.

    Example:
        class TestRollout(EvaluatorContract):
            name = "rollout"
    """

    kind = "evaluators"
    samples: ClassVar[bool] = True
    """It samples from the site's engines and rewards them; False for an outside harness."""

    def evaluate(self, site: Site, step: int = 0, evaluator: Any = None) -> dict[str, dict[str, float]]:
        return asyncio.run((evaluator or self.build()).evaluate(site, step))

    def test_every_set_has_its_metrics(self) -> None:
        """Under its name, as finite numbers; a set that is left out is not noticed until the end."""
        found = self.evaluate(Site())
        assert set(found) == {"half", "all"}
        for name, metrics in found.items():
            assert metrics, f"{name} has no metrics"
            for key, value in metrics.items():
                assert isinstance(value, int | float), f"{name}/{key} is a {type(value).__name__}"
                assert math.isfinite(value), f"{name}/{key} is {value}"

    def test_the_reward_is_that_of_the_answers(self) -> None:
        """Half of the first set is right, and all of the second."""
        if not self.samples:
            pytest.skip("does not sample from the site's engines")
        found = self.evaluate(Site())
        assert (found["half"]["reward"], found["all"]["reward"]) == (0.5, 1.0)

    def test_the_same_policy_gets_the_same_numbers(self) -> None:
        """At any step and as often as one likes: seeds follow from the prompts alone, and are not all the same."""
        site, evaluator = Site(), self.build()
        first, again = (self.evaluate(site, step, evaluator) for step in (0, 5))
        assert first == again
        if self.samples:
            half = len(site.engine.seeds) // 2
            assert sorted(site.engine.seeds[:half]) == sorted(site.engine.seeds[half:])
            assert len(set(site.engine.seeds)) > 1

    def test_an_engine_that_is_gone_is_not_a_bad_policy(self) -> None:
        """An error: a reward of 0 would be read as a policy that has collapsed."""
        if not self.samples:
            pytest.skip("does not sample from the site's engines")
        with pytest.raises(Exception, match=r"."):
            self.evaluate(Site(broken=True))
