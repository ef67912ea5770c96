"""The trainer by itself: an optimizer step, log-probabilities, a weight sync. Samples are made up, lengths vary."""

from __future__ import annotations

import itertools
import time

from miles.bench.engine import NEEDS, TOKENS
from miles.bench.measure import OWN, Benchmark, Quantity, Round
from miles.bench.workbench import Workbench
from miles.toolkit import plan_micro_batches
from miles.training.table import Table
from miles.types import Group


def _batch(bench: Workbench) -> list[Group]:
    size = bench.size
    return bench.groups(bench.spread_lengths(size.requests) * size.train_batches)


def _tokens(groups: list[Group]) -> int:
    return sum(len(sample.tokens) for group in groups for sample in group.samples)


async def train_step(bench: Workbench) -> Round:
    """One optimizer step on the batch: the time that workers take to pack, go forward and backward, and update."""
    parts = await bench.parts()

    async def once() -> dict[str, float]:
        groups = _batch(bench)
        await parts.trainer.step(groups)
        return {OWN: _tokens(groups) / parts.trainer.seconds}

    return once


async def log_probs(bench: Workbench) -> Round:
    """Log-probabilities of the batch under the actor, without gradient, packed as the trainer packs."""
    parts = await bench.parts()

    async def once() -> dict[str, float]:
        groups = _batch(bench)
        table = Table.from_groups(groups)
        plan = plan_micro_batches(table.lengths, parts.config.train.max_tokens_per_gpu)
        tables = [table.take(rows) for rows in plan]
        started = time.perf_counter()
        await parts.workers.call("forward", "actor", tables, ("log_probs",))
        return {OWN: _tokens(groups) / (time.perf_counter() - started)}

    return once


async def weight_sync(bench: Workbench) -> Round:
    """The trainer's weights into the engine."""
    parts, versions = await bench.parts(), itertools.count(1)

    async def once() -> dict[str, float]:
        return {OWN: 1e3 * await bench.mean_seconds(lambda: parts.weight_sync.push(version=next(versions)))}

    return once


BENCHMARKS = {
    "train_step": Benchmark("packing, forward, backward, optimizer on 64 samples", {OWN: TOKENS}, train_step, NEEDS),
    "log_probs": Benchmark("log-probabilities of 64 samples by the trainer", {OWN: TOKENS}, log_probs, NEEDS),
    "weight_sync": Benchmark("all weights from trainer to engine", {OWN: Quantity("ms", "lower")}, weight_sync, NEEDS),
}
