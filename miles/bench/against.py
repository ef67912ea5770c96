"""The torch engine against transformers' own generation, on the same model, in one process, in turns.

`generate` takes a padded batch and goes on until its longest response is done. `generate_batch`'s machinery, continuous
batching over a paged cache, keeps its manager from round to round and is timed from the first request to the last
result, so that its start-up does not count. Both draw from the whole distribution at temperature 1, as the engine does.
The engine also returns log-probabilities, and makes its draws independent of the batch; transformers does neither here.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from miles.bench.engine import TOKENS, WORKLOADS, Draw, Workload, seconds_of
from miles.bench.measure import OWN, Benchmark, Quantity, Round
from miles.bench.workbench import Workbench
from miles.errors import EngineError

RATIO = Quantity("times", "higher")
THEIRS = "transformers"
BLOCK = 256
"""Tokens in a block of the paged cache, transformers' default."""
Timed = Callable[[Workload], float]
"""Seconds that transformers takes for a workload."""


def contest(about: str, draw: Draw, opponent: Callable[[Workbench], Timed], needs: tuple[str, ...] = ()) -> Benchmark:
    """Both sides generate the same workload in each round; who begins changes every round."""

    async def prepare(bench: Workbench) -> Round:
        engine, timed, rounds = await bench.engine(), opponent(bench), itertools.count()

        async def once() -> dict[str, float]:
            work = draw(bench)
            seconds: dict[str, float] = {}
            sides: list[tuple[str, Callable[[], Awaitable[float]]]] = [
                ("ours", lambda: seconds_of(engine, work, bench)),
                ("theirs", lambda: _at_once(timed, work)),
            ]
            for name, side in sides if next(rounds) % 2 else reversed(sides):
                seconds[name] = await side()
            return {OWN: seconds["theirs"] / seconds["ours"], THEIRS: work.tokens / seconds["theirs"]}

        return once

    return Benchmark(about, {OWN: RATIO, THEIRS: Quantity(TOKENS.unit, "neither")}, prepare, needs)


async def _at_once(timed: Timed, work: Workload) -> float:
    return timed(work)


def generate(bench: Workbench) -> Timed:
    """`model.generate` on all prompts as one batch, responses that are done padded to the longest."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model = bench.transformers_model()

    class Lengths(StoppingCriteria):
        """Ends each row at the length its request asks for."""

        def __init__(self, ends: torch.Tensor):
            self.ends_N = ends

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends_N

    def timed(work: Workload) -> float:
        prompts = torch.tensor(work.prompts, device=bench.device)
        ends_N = torch.tensor(work.lengths, device=bench.device).repeat_interleave(work.samples) + prompts.shape[1]
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=max(work.lengths), num_return_sequences=work.samples,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        started = time.perf_counter()
        done = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([Lengths(ends_N)]),
        )
        shape = tuple(done.cpu().shape)
        seconds = time.perf_counter() - started
        _check(shape == (len(work.prompts) * work.samples, prompts.shape[1] + max(work.lengths)), shape)
        return seconds

    return timed


def continuous_batching(bench: Workbench) -> Timed:
    """`model.generate_batch` with a length for each request, which only its manager takes."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = bench.transformers_model()

    def timed(work: Workload) -> float:
        responses = len(work.prompts) * work.samples
        blocks = -(-(len(work.prompts[0]) + max(work.lengths)) // BLOCK)
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=max(work.lengths), num_return_sequences=work.samples,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        paged = ContinuousBatchingConfig(block_size=BLOCK, num_blocks=(responses + 1) * (blocks + 1))
        with model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=paged, persistent_manager=True
        ) as manager:
            started = time.perf_counter()
            for tokens, length in zip(work.prompts, work.lengths, strict=True):
                manager.add_request(tokens, max_new_tokens=length)
            found = sum(len(result.generated_tokens) for result in _finished(manager, responses))
            seconds = time.perf_counter() - started
        _check(found == work.tokens, found)
        return seconds

    return timed


def _finished(manager: Any, count: int) -> list[Any]:
    """The results of so many requests; raises when the manager's thread has died."""
    results: list[Any] = []
    while len(results) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            results.append(result)
        elif result is None and not manager.is_running():
            raise EngineError("transformers' continuous batching stopped working")
    return results


def _check(right: bool, found: Any) -> None:
    if not right:
        raise EngineError(f"transformers generated something else than was asked for: {found}")


BENCHMARKS = {
    **{
        f"vs_generate_{name}": contest(f"torch engine / transformers' generate: {about}", draw, generate)
        for name, (draw, about) in WORKLOADS.items()
    },
    **{
        f"vs_batching_{name}": contest(
            f"torch engine / transformers' continuous batching: {about}", draw, continuous_batching, ("psutil",)
        )
        for name, (draw, about) in WORKLOADS.items()
    },
}
