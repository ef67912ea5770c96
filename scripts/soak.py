"""Rollouts through bad days: thousands of requests through a proxy that spoils a share of them, and exact accounts.

A tiny model behind `miles serve`; before it a proxy that breaks connections, delays, answers nonsense and delivers
twice (`plugins/backends/miles-sglang/tests/faults.py`); before that the engine `sglang_external`, asked by the producer
of a run. At the end every sample must have come to exactly one end; those that failed must be those which never got a
whole answer; the others must hold what an undisturbed engine says to the same seeds; and the server must be idle.
Prints what is not so and exits with 1, if anything is not.

python scripts/soak.py --requests 10000 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from miles.api import EngineContext, GenerateContext, GenerateRequest, RolloutEngine, Sample, Status
from miles.builtins.generate import single_turn
from miles.config import Config, Spec
from miles.plugins import load_plugins
from miles.protocols import ChatContext
from miles.registry import Registry
from miles.rollout.engines import EngineFront
from miles.rollout.producer import Waves
from miles.rollout.task import Task
from miles.types import Prompt, SamplingParams

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugins/backends/miles-sglang/tests"))
from faults import Fault, FaultyProxy, RandomPlan, Record
from served import Witness, served, tiny_context

GROUP, PROMPTS = 8, 64
IDLE = 30.0
"""Seconds that the server has to end what nobody waits for any more."""


@dataclass(frozen=True)
class Weather:
    """How much is asked for, and how bad the day is."""

    requests: int = 10_000
    """Samples; a group has eight."""
    seed: int = 1
    share: float = 0.3
    """Of deliveries that meet a fault."""
    retries: int = 2
    """Of the client."""
    attempts: int = 2
    """At a sample, each with a seed of its own."""
    new_tokens: int = 6
    concurrency: int = 128
    timeout: float = 5.0
    """Of the client, in seconds; answers that are late are half as late again."""


@dataclass
class Outcome:
    """What there is to compare."""

    weather: Weather
    ended: list[Sample] = field(default_factory=list)
    """Every sample that the producer let go of."""
    seeds: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Of every attempt at every sample that was started, by id."""
    records: dict[int, Record] = field(default_factory=dict)
    """What the proxy noted of each request, by seed."""
    faults: Counter[Fault] = field(default_factory=Counter)
    generated: Counter[str] = field(default_factory=Counter)
    """Ids of requests that the server's engine worked on, and how often."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """The client's own."""
    left: int = 0
    """Requests that were still on the server when it should have been idle."""
    disturbed: list[int] = field(default_factory=list)
    """Ids of samples to whose seeds an undisturbed engine says something else."""
    seconds: float = 0.0


class Prompts:
    """A few short prompts, over and over."""

    drawn = 0

    def __len__(self) -> int:
        return PROMPTS

    def next_prompts(self, count: int) -> list[Prompt]:
        numbers = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [self.prompt(n % PROMPTS) for n in numbers]

    def every_prompt(self) -> list[Prompt]:
        return [self.prompt(n) for n in range(PROMPTS)]

    def prompt(self, n: int) -> Prompt:
        return Prompt(f"soak:{n}", "soak", tokens=[1 + n, 2 + n % 5, 3])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]


async def soak(weather: Weather) -> Outcome:
    """One batch of so many samples."""
    context, outcome = tiny_context(), Outcome(weather)
    registry = Registry(load_plugins())
    started = time.monotonic()
    witness = Witness(registry.build("rollout_engines", Spec(name="torch"), context=context))
    plan = RandomPlan(weather.seed, weather.share)
    async with (
        served(witness, context) as url,
        FaultyProxy(url, plan, delay=1.5 * weather.timeout) as proxy,
    ):
        options = {"urls": [proxy.url], "timeout": weather.timeout, "retries": weather.retries}
        spec = Spec(name="sglang_external", options=options)
        engine = registry.build("rollout_engines", spec, context=context)
        await engine.start()
        try:
            front = EngineFront([engine], weather.concurrency)
            producer = make_producer(weather, registry, context, front, outcome.seeds)
            groups = await producer.collect(0)
            outcome.counts = (await engine.health()).counts
        finally:
            await engine.close()
        outcome.seconds = time.monotonic() - started
        outcome.ended = [sample for group in groups for sample in group.samples] + producer.lost
        outcome.left = await still_running(witness)
        outcome.records = {r.body["sampling_params"]["sampling_seed"]: r for r in proxy.records.values()}
        outcome.faults, outcome.generated = proxy.counts, witness.generated
        sampling = producer.tasks["soak"].context.sampling
        outcome.disturbed = await disturbed(witness.engine, sampling, outcome.ended)
    return outcome


def make_producer(
    weather: Weather,
    registry: Registry,
    context: EngineContext,
    front: EngineFront,
    seeds: dict[int, list[int]],
) -> Waves:
    """The producer of a run, behind this front. Notes the seed of every attempt at a sample."""

    async def noted(context: GenerateContext, sample: Sample) -> Sample:
        seeds[sample.id].append(sample.seed)
        return await single_turn(context, sample)

    settings: dict[str, Any] = {
        "data": {
            "sets": [
                {
                    "name": "soak",
                    "sampling": {"max_new_tokens": weather.new_tokens},
                    "generate": "noted",
                    "reward": "said",
                }
            ]
        },
        "rollout": {
            "batch_size": weather.requests // GROUP,
            "n_samples_per_prompt": GROUP,
            "max_attempts": weather.attempts,
            "max_failed_fraction": 1.0,
        },
    }
    registry.add("generate_functions", "noted", noted)
    registry.add("rewards", "said", lambda sample: float(len(sample.text)))
    config = Config.model_validate(settings)
    chat = registry.build("chat_formats", Spec(name="template"), context=ChatContext(context.tokenizer))
    (task_set,) = config.data.sets
    return Waves(config, Prompts(), {"soak": Task(task_set, config, registry, front, chat)}, [])


async def still_running(witness: Witness) -> int:
    """Requests on the server, once it had time to end those that nobody waits for."""
    deadline = time.monotonic() + IDLE
    while witness.running and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return len(witness.running)


async def disturbed(engine: RolloutEngine, sampling: SamplingParams, ended: list[Sample]) -> list[int]:
    """Ids of finished samples that hold anything but what this engine itself says to the same prompt and seed."""

    async def differs(sample: Sample) -> bool:
        prompt, said = sample.tokens[: sample.prompt_length], sample.tokens[sample.prompt_length :]
        alone = await engine.generate(GenerateRequest(f"alone {sample.id}", prompt, sampling, sample.seed))
        log_probs = sample.columns["rollout_log_probs"][sample.prompt_length :]
        return said != alone.tokens or not np.allclose(log_probs, alone.log_probs, atol=1e-4)

    finished = [sample for sample in ended if sample.status is not Status.FAILED]
    differ = await asyncio.gather(*(differs(sample) for sample in finished))
    return [sample.id for sample, wrong in zip(finished, differ, strict=True) if wrong]


def complaints(outcome: Outcome) -> list[str]:
    """What does not agree; empty when everything does."""
    found = [f"{outcome.left} requests were still running on the server"] if outcome.left else []
    ends = Counter(sample.id for sample in outcome.ended)
    for id in sorted(outcome.seeds.keys() | ends.keys()):
        if ends[id] != 1 or id not in outcome.seeds:
            found.append(f"sample {id} was started {len(outcome.seeds.get(id, []))} times and ended {ends[id]} times")
    for sample in outcome.ended:
        found += wrong_end(outcome, sample)
    found += [f"sample {id} is not what an undisturbed engine says" for id in outcome.disturbed]
    for record in outcome.records.values():
        if len(set(record.rids)) < len(record.rids):
            found.append(f"tries share an id: {record.rids}")
        once = {rid for rid, fate in zip(record.rids, record.fates, strict=True) if fate is not Fault.TWICE}
        found += [f"{rid} was worked on {outcome.generated[rid]} times" for rid in once if outcome.generated[rid] > 1]
    return found


def wrong_end(outcome: Outcome, sample: Sample) -> Iterator[str]:
    """What contradicts the end that a sample has come to: it failed if and only if no try at it was answered, and it
    took the one answer of its last attempt."""
    answers = [answers_to(outcome, seed) for seed in outcome.seeds[sample.id]]
    *earlier, last = answers
    if sample.status is Status.FAILED:
        if any(answers):
            yield f"sample {sample.id} failed, although it was answered: {sample.error}"
        elif len(answers) < outcome.weather.attempts:
            yield f"sample {sample.id} failed after {len(answers)} attempts of {outcome.weather.attempts}"
    elif any(earlier) or len(last) != 1:
        yield f"sample {sample.id} ended as {sample.status} with {[len(some) for some in answers]} answers"
    elif sample.tokens[sample.prompt_length :] != last[0]["output_ids"]:
        yield f"sample {sample.id} holds another's answer"


def answers_to(outcome: Outcome, seed: int) -> list[dict[str, Any]]:
    """Answers that arrived whole; a request may have met nothing but closed doors."""
    record = outcome.records.get(seed)
    return record.answers if record else []


def told(outcome: Outcome) -> list[str]:
    """A summary for people."""
    statuses = Counter(sample.status for sample in outcome.ended)
    deliveries = sum(len(record.fates) for record in outcome.records.values())
    return [
        f"{len(outcome.ended)} samples in {outcome.seconds:.0f} s: "
        + ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())),
        f"{deliveries} deliveries of {len(outcome.records)} requests, {sum(outcome.faults.values())} spoilt:",
        *(f"  {count:6} {fault}" for fault, count in outcome.faults.most_common()),
        "the client counted: " + ", ".join(f"{name} {value:g}" for name, value in sorted(outcome.counts.items())),
    ]


def parse(words: Sequence[str] | None = None) -> Weather:
    """Every field of `Weather` is a flag."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for one in fields(Weather):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    return Weather(**vars(parser.parse_args(words)))


def main() -> int:
    outcome = asyncio.run(soak(parse()))
    for line in told(outcome):
        print(line)
    wrong = complaints(outcome)
    for line in wrong[:20]:
        print("WRONG:", line)
    print(f"{len(wrong)} complaints" if wrong else "every account agrees")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
