"""The rollout engine by itself: tokens a second of generation and of scoring.

Responses have the length that their request asks for: nothing ends them early. Prompts are new in every round. Tokens
are counted as a trainer would: generated ones, and for scoring all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miles.bench.measure import OWN, Benchmark, Quantity, Round
from miles.bench.workbench import Workbench
from miles.errors import EngineError
from miles.protocols import RolloutEngine
from miles.types import GenerateRequest, SamplingParams

TOKENS = Quantity("tokens/s", "higher")
NEEDS = ("miles-qwen", "miles-grpo")
"""Of every benchmark that builds a job."""


@dataclass(frozen=True)
class Workload:
    """What is generated in one go: `samples` responses to each prompt; a length for each prompt's responses."""

    prompts: list[list[int]]
    lengths: list[int]
    samples: int = 1

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(self.lengths) * self.samples


Draw = Callable[[Workbench], Workload]


def fixed(bench: Workbench) -> Workload:
    size = bench.size
    return Workload(bench.prompts(size.requests, size.prompt_len), [size.new_tokens] * size.requests)


def variable(bench: Workbench) -> Workload:
    size = bench.size
    return Workload(bench.prompts(size.requests, size.prompt_len), bench.spread_lengths(size.requests))


def shared_prompt(bench: Workbench) -> Workload:
    size = bench.size
    prompts = bench.prompts(size.shared_prompts, size.shared_prompt_len)
    return Workload(prompts, [size.new_tokens] * size.shared_prompts, size.shared_samples)


WORKLOADS = {
    "fixed": (fixed, "64 responses of 64 tokens"),
    "variable": (variable, "64 responses of 4 to 256 tokens"),
    "shared_prompt": (shared_prompt, "4 prompts of 512 tokens, 8 responses of 64 tokens to each"),
}
"""Name -> how it is drawn, and what it is at size `cpu`."""


def generation(about: str, draw: Draw) -> Benchmark:
    """Generate a workload with the engine."""

    async def prepare(bench: Workbench) -> Round:
        engine = await bench.engine()

        async def once() -> dict[str, float]:
            tokens, seconds = 0, 0.0
            while seconds < bench.size.seconds or not tokens:
                work = draw(bench)
                seconds += await seconds_of(engine, work, bench)
                tokens += work.tokens
            return {OWN: tokens / seconds}

        return once

    return Benchmark(f"torch engine: {about}", {OWN: TOKENS}, prepare, NEEDS)


async def seconds_of(engine: RolloutEngine, work: Workload, bench: Workbench) -> float:
    """How long the engine takes for a workload; all requests come at once.

    Raises:
        EngineError: a response has another length than asked for, and tokens a second would mean nothing.
    """
    requests = [
        GenerateRequest(
            f"{bench.draw.random()}",
            tokens,
            SamplingParams(max_new_tokens=length),
            seed=bench.draw.getrandbits(31),
        )
        for tokens, length in zip(work.prompts, work.lengths, strict=True)
        for _ in range(work.samples)
    ]
    started = time.perf_counter()
    results = await asyncio.gather(*map(engine.generate, requests))
    seconds = time.perf_counter() - started
    if (found := sum(len(result.tokens) for result in results)) != work.tokens:
        raise EngineError(f"the engine generated {found} tokens, and {work.tokens} were asked for")
    return seconds


async def scoring(bench: Workbench) -> Round:
    """Log-probabilities of given tokens: as long as prompt and response of the variable workload."""
    engine = await bench.engine()

    async def once() -> dict[str, float]:
        streams = _streams(bench, [*bench.spread_lengths(bench.size.requests)])
        started = time.perf_counter()
        await asyncio.gather(*map(engine.score, streams))
        return {OWN: sum(map(len, streams)) / (time.perf_counter() - started)}

    return once


def _streams(bench: Workbench, lengths: Sequence[int]) -> list[list[int]]:
    return [bench.prompts(1, bench.size.prompt_len + length)[0] for length in lengths]


BENCHMARKS = {
    **{f"engine_{name}": generation(about, draw) for name, (draw, about) in WORKLOADS.items()},
    "engine_score": Benchmark("torch engine: log-probabilities of 64 given sequences", {OWN: TOKENS}, scoring, NEEDS),
}
