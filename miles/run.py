"""A run: everything that one job is made of, its state, and how that is saved, resumed and summed up.

`miles.build` puts one together from a config; `miles.loop` drives it. From Python:

    run = miles.train("config.yaml", reward=my_function)
    print(run.summary["evaluation"])
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from miles.build import Parts
from miles.checkpoint import Checkpoint, CheckpointStore, find_checkpoint
from miles.config import Config
from miles.config.derived import Derived
from miles.determinism import random_state, set_random_state
from miles.errors import CheckpointError, EngineLostError, RolloutError, RunInterrupted, WeightSyncError
from miles.interrupt import Interrupt
from miles.log import counted, logger
from miles.modeling import resolve_device
from miles.protocols import RunInfo
from miles.report.dump import FOLDER, dump_samples
from miles.report.progress import Progress
from miles.rollout.measure import batch_metrics
from miles.rollout.recovery import Recovery
from miles.rollout.saved import read_groups, write_groups
from miles.rundir import METRICS, versions, write_summary
from miles.training.checksums import compare_checksums
from miles.types import Group, Metrics

T = TypeVar("T")
STATE, HELD = "state.json", "rollouts.npz"
CLOCK = "perf/"
"""Metrics of wall time begin so: they belong to the process that measured them, and no checkpoint keeps them."""


@dataclass
class Totals:
    """What a run has done so far, its earlier lives included."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0


@dataclass
class Run:
    """A running job. Plugins receive it in lifecycle hooks; evaluators and hooks may read everything."""

    config: Config
    derived: Derived
    parts: Parts
    step: int = 0
    """Completed steps; also the version of the trainer's weights."""
    metrics: Metrics = field(default_factory=dict)
    """Of the last completed step."""
    engine_version: int = -1
    evaluation: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    """Set -> `first` and `last` -> metrics."""
    totals: Totals = field(default_factory=Totals)
    status: str = "running"
    resumed_from: int | None = None
    restarts: int = 0
    """Times that this process started it again, having lost a worker."""
    interrupt: Interrupt = field(default_factory=Interrupt)

    def __post_init__(self) -> None:
        self.directory: Path = self.config.run.dir
        self.hook = self.parts.registry.plugins.hook
        self.progress = Progress(self.derived.num_rollout)
        self.store = CheckpointStore(
            self.config.checkpoint.dir or self.directory / "checkpoints", self.config.checkpoint.keep
        )
        # The parts that the loop works with, under short names.
        parts, most = self.parts, self.config.rollout.max_engine_restarts
        self.producer, self.trainer, self.evaluator = parts.producer, parts.trainer, parts.evaluator
        self.residency, self.weight_sync, self.tracking = parts.residency, parts.weight_sync, parts.tracking
        self.load_prompts, self.eval_task = parts.load_prompts, parts.eval_task
        self.recovery = Recovery(parts.engines, most, self._restart, self._resync)
        parts.front.recovery = parts.gate.recovery = self.recovery
        self.header = self._header()
        self._trainer_free = asyncio.Lock()
        """Weights are sent between two batches: half-way through one they are of no version."""
        self._clock = time.perf_counter()
        self._step_clock = self._clock
        self._take_picture()

    # ------------------------------------------------------------------------------------------------ what is due when

    def sync_due(self) -> bool:
        return self.step % self.config.weight_sync.interval == 0 or self.step == self.derived.num_rollout

    def weights_behind(self) -> bool:
        return self.engine_version != self.step

    def eval_due(self) -> bool:
        section = self.config.eval
        if not section.sets:
            return False
        if self.step == 0:
            return section.before_train
        at_interval = section.interval is not None and self.step % section.interval == 0
        return at_interval or self.step == self.derived.num_rollout

    def save_due(self) -> bool:
        interval = self.config.checkpoint.interval or math.ceil(self.derived.num_rollout / 10)
        return self.step == self.derived.num_rollout or self.step % interval == 0

    # -------------------------------------------------------------------------------------------------- within a step

    async def collect(self) -> tuple[list[Group], Metrics]:
        """The next batch and its metrics. When none can be had, what was generated for it goes to disk, failures and
        all."""
        try:
            groups = await self.interruptible(self.producer.collect(self.step))
        except RolloutError:
            self._dump(self.producer.groups)
            raise
        counts = await self.parts.gate.take_counts()
        if self.parts.dump is not None:
            await self.parts.dump.write(self.step + 1, groups)
        return groups, self._rollout_metrics(groups) | {f"rollout/engine/{name}": n for name, n in counts.items()}

    async def interruptible(self, work: Awaitable[T]) -> T:
        """Await rollouts; a signal cancels them and raises RunInterrupted. Engines that were lost are up afterwards, or
        start no more."""
        try:
            result = await self.interrupt.guard(work)
        except RunInterrupted:
            await self.recovery.close()
            await self.producer.close()
            await self.parts.gate.abort()
            raise
        await self.recovery.find_lost()
        return result

    async def push_weights(self) -> Metrics:
        """Send weights, and compare what engine and trainer hold and say when that is asked for."""
        probe = self.parts.probe
        if self.producer.unquiet:
            await self.interruptible(self.producer.quiet())
        async with self.producer.updating(self.step):
            metrics = await self._deliver_weights()
        async with self.residency.syncing():
            if probe:
                await compare_checksums(self.parts.workers, self.parts.engines, self.step)
            expected = await probe.trainer(self.parts.workers) if probe else None
        if probe and expected is not None:
            async with self.residency.rollout():
                difference = await probe.compare(expected, self.parts.engines, self.step)
            metrics["weight_sync/logprob_abs_diff"] = difference
            if self.config.weight_sync.verify == "first":
                self.parts.probe = None
        return metrics

    async def _deliver_weights(self) -> Metrics:
        """Push; if that fails, once more from the beginning. Meanwhile no engine serves half of the weights."""
        async with self._trainer_free:
            try:
                metrics = await self._push()
            except (WeightSyncError, EngineLostError) as error:
                logger.warning("%s: %s; trying once more", type(error).__name__, error)
                await self.recovery.find_lost()
                metrics = await self._push()
            self.engine_version = self.step
            self.recovery.have_weights()
            return metrics

    async def _push(self) -> Metrics:
        async with self.residency.syncing():
            return dict(await self.weight_sync.push(version=self.step))

    async def _restart(self, engine: Any) -> None:
        await self.residency.make_room()
        await engine.restart()
        await self.residency.settle(engine)

    async def _resync(self) -> None:
        async with self._trainer_free:
            if self.recovery.serving():
                return  # a weight sync came first
        await self._deliver_weights()
        async with self.residency.rollout():
            logger.info("weights of version %d were sent in the middle of a rollout", self.step)

    def _rollout_metrics(self, groups: list[Group]) -> Metrics:
        traffic = self.parts.gate.take_traffic()
        self.totals.prompt_tokens += traffic.prompt_tokens
        self.totals.generated_tokens += traffic.generated_tokens
        trained = sum(s.trainable_tokens for g in groups for s in g.samples)
        self.totals.trained_tokens += trained
        cached = traffic.cached_tokens / max(traffic.prompt_tokens, 1)
        return {
            **batch_metrics(groups),
            **self.producer.metrics(),
            "perf/generate_time": traffic.seconds,
            "rollout/cached_ratio": cached,
            "rollout/generated_tokens": float(traffic.generated_tokens),
            "rollout/trained_tokens": float(trained),
        }

    async def learn(self, groups: list[Group]) -> Metrics:
        """Train on a batch. However that ends, its samples go to disk, with what training made of them."""
        removed = self.producer.take_removed(groups)
        async with self._trainer_free:
            try:
                return removed | await self.trainer.step(groups)
            finally:
                self._dump(groups)

    def _dump(self, groups: Sequence[Group]) -> None:
        samples = [*self.producer.lost, *(sample for group in groups for sample in group.rollouts)]
        limit = self.config.rollout.dump_samples
        dump_samples(self.directory / FOLDER, self.step + 1, samples, self.trainer.learned, limit)

    def advance(self, metrics: Metrics) -> None:
        """The step is trained: take the picture that a checkpoint would save."""
        self.step += 1
        self.metrics = {name: float(value) for name, value in metrics.items()}
        self._count_seconds()
        self._take_picture()

    def note_evaluation(self, results: Mapping[str, Metrics]) -> Metrics:
        """Keep the first and the last evaluation of each set; returns them as metrics of this step."""
        for name, metrics in results.items():
            kept = self.evaluation.setdefault(name, {"first": {**metrics, "step": self.step}})
            kept["last"] = {**metrics, "step": self.step}
        return {f"eval/{name}/{k}": v for name, metrics in results.items() for k, v in metrics.items()}

    def track(self, metrics: Metrics) -> None:
        """Write down a step, with where its time went."""
        now = time.perf_counter()
        seconds, self._step_clock = now - self._step_clock, now
        metrics = {**metrics, **self.residency.take_seconds(), "perf/step_time": seconds}
        generated, generating = metrics.get("rollout/generated_tokens", 0.0), metrics.get("perf/generate_time", 0.0)
        if generating:
            metrics["perf/generate_tokens_per_second"] = generated / generating
        one_after_another = self.config.rollout.mode == "sync" and not self.eval_due()
        if seconds and "perf/workers_time" in metrics and one_after_another:
            metrics["perf/overhead_share"] = 1 - (generating + metrics["perf/workers_time"]) / seconds
        tokens = generated or metrics.get("rollout/trained_tokens", 0.0)
        if tokens and seconds:
            metrics["perf/tokens_per_second"] = tokens / seconds
        self.tracking.log(self.step, metrics)
        self.progress.line(self.step, metrics)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _take_picture(self) -> None:
        """Everything but the models: what JSON can hold, and groups of rollouts."""
        state = {
            "step": self.step,
            "metrics": {name: value for name, value in self.metrics.items() if not name.startswith(CLOCK)},
            "evaluation": self.evaluation,
            "totals": vars(self.totals),
            "producer": self.producer.state_dict(),
            "trainer": self.trainer.state_dict(),
            "random": random_state(),
        }
        self._boundary, self._held = json.loads(json.dumps(state)), self.producer.held()

    async def save_if_due(self) -> bool:
        if not self.save_due():
            return False
        await self.save()
        return True

    async def save(self) -> Path:
        """Save the last boundary. The trainer must be on its device."""
        path = await self.store.save(self._boundary["step"], self._write)
        if self.config.checkpoint.save_hf:
            target = self.directory / self.config.checkpoint.save_hf.format(step=self.step)
            await self.parts.workers.call("export_hf", target)
        self.hook.miles_on_checkpoint_saved(run=self, step=self._boundary["step"], path=str(path))
        return path

    async def _write(self, folder: Path) -> None:
        await self.parts.workers.call("save", folder)
        (folder / STATE).write_text(json.dumps(self._boundary))
        if self._held:
            await asyncio.to_thread(write_groups, folder / HELD, self._held)

    async def restore(self) -> None:
        """Go on from the newest checkpoint of this run, or start from `checkpoint.load`, or from the beginning."""
        mode = self.config.run.resume
        found: Checkpoint | None = None if mode == "never" else self.store.newest()
        if found is None and mode == "must":
            raise CheckpointError(f"--resume must: there is no checkpoint in {self.store.directory}")
        if found is not None:
            async with self.residency.training():
                await self.read(found.path)
            self.resumed_from = self.step
            done = self.step >= self.derived.num_rollout
            rest = "there is nothing left to do; --num-rollout asks for more" if done else "going on from there"
            logger.info("%s holds step %d of %d: %s", found.path, self.step, self.derived.num_rollout, rest)
        elif self.config.checkpoint.load is not None:
            start = find_checkpoint(self.config.checkpoint.load)
            async with self.residency.training():
                await self.parts.workers.call("load", start.path, weights_only=True)
            logger.info("starting from the weights of %s", start.path)
        if found is None and (self.directory / METRICS).exists():
            logger.warning("%s holds a run without a checkpoint, which is started again", self.directory)

    async def read(self, folder: Path) -> None:
        """Take everything from a checkpoint."""
        await self.parts.workers.call("load", folder)
        text = (folder / STATE).read_text()
        state, self._boundary = json.loads(text), json.loads(text)
        self.step, self.metrics = state["step"], state["metrics"]
        self.evaluation, self.totals = state["evaluation"], Totals(**state["totals"])
        held = read_groups(folder / HELD) if (folder / HELD).exists() else []
        self.producer.load_state_dict(state["producer"], held)
        self._held = self.producer.held()
        self.trainer.load_state_dict(state["trainer"])
        set_random_state(state["random"])

    # --------------------------------------------------------------------------------------------------------- the end

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.totals.seconds += now - self._clock
        self._clock = now

    def _header(self) -> list[str]:
        """What a person wants to know before it begins."""
        config, model = self.config, self.parts.model
        device, steps = resolve_device(config.resources.device), self.derived.num_rollout
        answers, ranks = self.hook.miles_report_header(config=config), self.parts.workers.size
        several = f", {ranks} train ranks" if ranks > 1 else ""
        prompts, sets = len(self.producer.source), ", ".join(task_set.name for task_set in config.data.sets)
        return [
            f"{config.run.name} in {self.directory}: {counted(steps, 'step')} on {device}{several}",
            f"{model.hf_config.model_type} from {model.checkpoint}; {prompts} prompts ({sets})",
            *(line for said in answers for line in ([said] if isinstance(said, str) else said)),
        ]

    def info(self) -> RunInfo:
        """What trackers are told of the run."""
        settings = self.config.model_dump(mode="json")
        return RunInfo(self.config.run.name, self.directory, settings, self.resumed_from)

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says."""
        return {
            "status": self.status,
            "name": self.config.run.name,
            "header": self.header,
            "steps": self.step,
            "seconds": round(self.totals.seconds, 3),
            "tokens": {
                "prompt": self.totals.prompt_tokens,
                "generated": self.totals.generated_tokens,
                "trained": self.totals.trained_tokens,
            },
            "rollouts": self.producer.ledger.state_dict() | {"pending": len(self.producer.ledger.pending)},
            "evaluation": self.evaluation,
            "resumed_from": self.resumed_from,
            "restarts": self.restarts,
            "versions": versions(),
        }

    def write_summary(self) -> None:
        self._count_seconds()
        write_summary(self.directory, self.summary)
