"""What is neither model nor engine: packing, advantages, rewards, hooks, configuration, start-up, and a yardstick."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch

from miles.api import Prompt, Sample, hookimpl
from miles.bench.measure import OWN, Benchmark, Quantity, Round
from miles.bench.workbench import SEED, Workbench
from miles.config import Spec
from miles.plugins import load_plugins
from miles.toolkit import build_micro_batch, plan_micro_batches
from miles.training.schedule import rank_micro_batches
from miles.types import AdvantageInputs

PACK_TOKENS = 8192
PLAN_RANKS = 64
GROUP = 8
RESPONSE = 128
HOOK_CALLS = 10_000
MATMULS, MATRIX = 8, 1024


async def packing(bench: Workbench) -> Round:
    """Plan and build the micro-batches of many samples of 16 to 272 tokens, with one column."""
    draw = np.random.default_rng(SEED)
    lengths = draw.integers(16, 272, bench.size.packed_samples)
    tokens = [np.zeros(length, np.int64) for length in lengths]
    columns = {"mask": [np.ones(length, np.float32) for length in lengths]}

    def work() -> None:
        for rows in plan_micro_batches(lengths.tolist(), PACK_TOKENS):
            build_micro_batch(rows, tokens, columns)

    return _mean_seconds(bench, work)


async def schedule(bench: Workbench) -> Round:
    """Plan the same number of samples, of lengths as responses have them, for many ranks: no sample is touched."""
    draw = np.random.default_rng(SEED)
    lengths = np.minimum(draw.lognormal(6.5, 1.0, bench.size.packed_samples).astype(int) + 1, PACK_TOKENS).tolist()
    return _mean_seconds(
        bench, lambda: rank_micro_batches(lengths, PLAN_RANKS, PACK_TOKENS, micro_batch_size=1, costs=lengths)
    )


async def advantages(bench: Workbench) -> Round:
    """GRPO over a large batch."""
    samples = bench.size.advantage_samples
    number_N = torch.arange(samples)
    estimator = bench.registry.build("advantage_estimators", Spec(name="grpo"))
    inputs = AdvantageInputs(
        rewards_N=torch.rand(samples, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64),
        mask_T=torch.ones(samples * RESPONSE),
        bounds=[0, *accumulate([RESPONSE] * samples)],
        group_N=number_N // GROUP,
        rollout_N=number_N,
    )
    return _mean_seconds(bench, lambda: estimator(inputs), scale=1e3)


async def reward(bench: Workbench) -> Round:
    """`exact_match` on short answers, half of them right."""
    judge = bench.registry.build("rewards", Spec(name="exact_match"))
    draw, samples = random.Random(SEED), []
    for number in range(bench.size.rewarded_samples):
        label = str(draw.randrange(1000))
        prompt = Prompt(f"made-up:{number}", "default", text="", label=label, tokens=[0])
        sample = Sample.begin(prompt, id=number, group_id=number // GROUP)
        sample.text = label if number % 2 else f"not {label}"
        samples.append(sample)

    async def work() -> None:
        for sample in samples:
            await judge.score(sample)

    async def once() -> dict[str, float]:
        return {OWN: len(samples) / await bench.mean_seconds(work)}

    return once


class Listener:
    """A plugin with one hook that does nothing."""

    MILES_API = 1

    @hookimpl
    def miles_on_weight_sync_end(self, version: int) -> None:
        pass


async def hook_call(bench: Workbench) -> Round:
    """A lifecycle hook with one listener."""
    hook = load_plugins(bench.block, extra=[Listener()]).hook

    def work() -> None:
        for _ in range(HOOK_CALLS):
            hook.miles_on_weight_sync_end(run=None, version=1, metrics={})

    return _mean_seconds(bench, work, scale=1e6 / HOOK_CALLS)


async def config_resolution(bench: Workbench) -> Round:
    """A small job's configuration: defaults, settings, checks. Plugins are loaded already."""
    return _mean_seconds(bench, lambda: bench.resolve("resolved"), scale=1e3)


def start_up(*arguments: str) -> Callable[[Workbench], Awaitable[Round]]:
    """A Python process from beginning to end."""

    async def prepare(bench: Workbench) -> Round:
        def work() -> None:
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

        return _mean_seconds(bench, work)

    return prepare


async def matmul(bench: Workbench) -> Round:
    """Matrix products in fp32, on a CPU in one thread: how fast the machine itself is at the moment."""
    left, right = (torch.rand(MATRIX, MATRIX, device=bench.device) for _ in range(2))

    def work() -> None:
        for _ in range(MATMULS):
            product = left @ right
        float(product[0, 0])  # it is done when its result is here

    async def once() -> dict[str, float]:
        with one_thread():
            return {OWN: MATMULS * 2 * MATRIX**3 / await bench.mean_seconds(work) / 1e9}

    return once


@contextmanager
def one_thread() -> Iterator[None]:
    """The driver of a run computes in one thread: it leaves the others to whoever trains and generates."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mean_seconds(bench: Workbench, work: Callable[[], object], scale: float = 1.0) -> Round:
    async def once() -> dict[str, float]:
        with one_thread():
            return {OWN: scale * await bench.mean_seconds(work)}

    return once


def _lower(unit: str) -> dict[str, Quantity]:
    return {OWN: Quantity(unit, "lower")}


CLI = ("-c", "import miles.cli")
PLUGINS = ("-m", "miles", "plugins")
BENCHMARKS = {
    "packing": Benchmark("100,000 samples into micro-batches of 8,192 tokens", _lower("s"), packing),
    "schedule": Benchmark("100,000 samples of up to 8,192 tokens, planned for 64 ranks", _lower("s"), schedule),
    "advantages": Benchmark("GRPO over 16,384 samples of 128 tokens", _lower("ms"), advantages, ("miles-grpo",)),
    "reward": Benchmark("exact_match", {OWN: Quantity("samples/s", "higher")}, reward, ("miles-math",)),
    "hook": Benchmark("a lifecycle hook with one listener", _lower("us"), hook_call),
    "config": Benchmark("resolve a job's configuration", _lower("ms"), config_resolution, ("miles-grpo",)),
    "start_cli": Benchmark("a process that imports miles.cli", _lower("s"), start_up(*CLI)),
    "start_plugins": Benchmark("a process that runs `miles plugins`", _lower("s"), start_up(*PLUGINS)),
    "machine": Benchmark("a yardstick: matrix products of 1024 x 1024", {OWN: Quantity("GFLOP/s", "neither")}, matmul),
}
