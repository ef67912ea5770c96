"""The jobs that a person starts: training, rollouts alone and evaluation, from the command line or from Python."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from miles.build import build, evaluation_parts, load_model, make_producer, serve_weights, training_source
from miles.checkpoint import MANIFEST, find_checkpoint
from miles.config import Config
from miles.config.derived import Derived
from miles.config.load import Resolved, plugin_wishes, resolve
from miles.determinism import prepared_process
from miles.diagnosis.preflight import require_ready
from miles.errors import RunInterrupted, WorkerError
from miles.interrupt import Interrupt
from miles.log import counted, logger, speak
from miles.loop import train as train_loop
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.report.page import leave_report
from miles.report.progress import Progress
from miles.rollout.dump import Dump
from miles.rollout.gate import Gate
from miles.rollout.measure import batch_metrics
from miles.rollout.producer import Producer
from miles.run import Run
from miles.rundir import note_failure, run_directory
from miles.tracking import Tracking
from miles.types import Metrics
from miles.workers.garbage import settle, unsettle

T = TypeVar("T")
PYTHON_REWARD = "reward_function"


def train(
    config: str | Path | Mapping[str, Any] | Sequence[str | Path] = (),
    *,
    reward: Callable[..., Any] | None = None,
    plugins: Sequence[Any] = (),
    **flags: Any,
) -> Run:
    """Train in this process and return the finished run.

    Args:
        config: a YAML file, several of them, or a mapping.
        reward: a function `(sample) -> float` that judges every task set, training and evaluation.
        plugins: modules or objects with hook implementations, besides the installed ones.
        flags: command-line flags by name, such as `lr=1e-5` or `rollout_batch_size=64`.

    Example:
        def reward(sample):
            return float(sample.text == sample.prompt.label)

        run = miles.train("config.yaml", reward=reward, lr=1e-5)
    """
    files = (config,) if isinstance(config, str | Path | Mapping) else config
    block, require = plugin_wishes(files, ())
    loaded = load_plugins(block, require, extra=plugins)
    overrides = flags if reward is None else {**flags, "data.sets.*.reward": reward, "eval.sets.*.reward": reward}
    resolved = resolve(files, (), loaded, overrides=overrides)
    require_ready(resolved)
    return run_training(resolved)


def run_training(resolved: Resolved) -> Run:
    """The job of `miles train`."""
    return _in_event_loop(run_job(resolved))


def run_evaluation(resolved: Resolved, checkpoint: Path | None = None) -> dict[str, Metrics]:
    """The job of `miles eval`: every eval set on a checkpoint, of miles or of Hugging Face."""
    return _in_event_loop(evaluate_job(resolved, checkpoint))


def run_rollouts(resolved: Resolved) -> list[Metrics]:
    """The job of `miles rollout`: metrics of each batch that it made."""
    return _in_event_loop(rollout_job(resolved))


async def run_job(resolved: Resolved) -> Run:
    """Build, restore, train, and leave a run directory that says how it went. A run that lost a worker starts again
    from its last checkpoint, as often as `resources.max_restarts` says.

    Raises:
        RunInterrupted: a signal asked to stop; where training had begun, the state is saved.
        WorkerError: a worker failed, died or hangs, once too often.
    """
    config, registry = resolved.config, resolved.registry
    registry.plugins.hook.miles_configure(config=config)
    with run_directory(config, registry.plugins):
        try:
            restarts, interrupt = 0, Interrupt()
            while True:
                try:
                    return await _attempt(config, registry, restarts, interrupt)
                except WorkerError as error:
                    if restarts == config.resources.max_restarts or interrupt.signal is not None:
                        itself = "" if restarts else "; --max-restarts does by itself"
                        error.add_note(f"the same command goes on from the last checkpoint{itself}")
                        raise
                    restarts += 1
                    logger.error("%s\nrestart %d of %d", error, restarts, config.resources.max_restarts)
                    if config.run.resume == "never":  # what is in the directory now is this run's own
                        config = _changed(config, "run", resume="auto")
        except BaseException as error:
            note_failure(config.run.dir, error)
            raise
        finally:
            if config.run.report:
                leave_report(config.run.dir)


async def _attempt(config: Config, registry: Registry, restarts: int, interrupt: Interrupt) -> Run:
    """The run from its last checkpoint, or its beginning, to its end. Nothing that it started is left behind."""
    async with _ready_for_work(config, interrupt) as stack:
        tracking = Tracking([(spec.name, registry.build("trackers", spec)) for spec in config.tracking])
        derived, parts = await build(config, registry, tracking, stack)
        run = Run(config, derived, parts, restarts=restarts, interrupt=interrupt)
        stack.push_async_callback(run.recovery.close)
        for line in run.header:
            logger.info("%s", line)
        settle()
        stack.callback(unsettle)
        await _drive(run)
        return run


@asynccontextmanager
async def _ready_for_work(config: Config, interrupt: Interrupt) -> AsyncIterator[AsyncExitStack]:
    """Around a job: seeds are set, and signals cancel it. What it gives to the stack is closed at its end."""
    with prepared_process(config.run), interrupt.listening(asyncio.current_task()):
        async with AsyncExitStack() as stack:
            yield stack


async def _drive(run: Run) -> None:
    """Restore and train. However that ends, trackers and plugins are told and the summary is written."""
    error: BaseException | None = None
    try:
        await run.restore()
        run.tracking.start(run.info())
        run.hook.miles_on_run_start(run=run)
        try:
            with run.interrupt.listening():
                await train_loop(run)
        except RunInterrupted as stop:
            async with run.residency.training():
                path = await run.save()
            logger.warning("%s; saved %s: the same command goes on from there", stop, path)
            raise
        run.status = "completed"
        logger.info("completed: %s; everything is in %s", counted(run.step, "step"), run.directory)
    except BaseException as failure:
        stopped = isinstance(failure, RunInterrupted | asyncio.CancelledError)
        error, run.status = failure, "interrupted" if stopped else "failed"
    for last in (
        run.write_summary,
        partial(run.tracking.finish, run.status),
        partial(run.hook.miles_on_run_end, run=run, error=error),
    ):
        try:
            last()
        except Exception as failure:
            if error is not None:
                logger.warning("at the end of the run: %s: %s", type(failure).__name__, failure)
            error = error or failure
    if error is not None:
        raise error


async def rollout_job(resolved: Resolved) -> list[Metrics]:
    """Generate, judge and filter the batches of a run without training, and write each to `rollout.dump`. A folder that
    holds some of them is gone on with, as if nobody had stopped.

    Raises:
        ConfigError: the folder holds batches of something else.
        RunInterrupted: a signal asked to stop; every whole batch is in the folder.
    """
    config, registry = resolved.config, resolved.registry
    registry.plugins.hook.miles_configure(config=config)
    load = config.checkpoint.load
    ours = find_checkpoint(load) if load is not None else None
    assert config.rollout.dump is not None
    dump = Dump(config.rollout.dump, "miles rollout", config, str(ours.path.resolve()) if ours else "")
    async with _ready_for_work(config, Interrupt()) as stack:
        model = load_model(config, registry)
        source = training_source(config, registry, model)
        steps = Derived.of(config, len(source)).num_rollout
        if dump.batches:
            logger.info("%s holds %d of %d batches", dump.folder, dump.batches, steps)
        if dump.batches >= steps:
            return []
        gate = Gate(await serve_weights(config, registry, model, stack, ours), config.rollout.concurrency)
        in_waves = _changed(config, "rollout", mode="sync", partial_rollout=False)  # nobody trains
        producer = make_producer(in_waves, registry, model, source, gate, steps)
        if dump.producer is not None:
            producer.load_state_dict(dump.producer)
        return await _batches(producer, gate, dump, steps)


async def _batches(producer: Producer, gate: Gate, dump: Dump, steps: int) -> list[Metrics]:
    """Those that are missing; metrics of each."""
    found: list[Metrics] = []
    progress = Progress(steps)
    for step in range(dump.batches, steps):
        groups = await producer.collect(step)
        await dump.write(step + 1, groups, producer.state_dict())
        traffic = gate.take_traffic()
        metrics = {**batch_metrics(groups), **producer.metrics()}
        metrics["rollout/generated_tokens"] = float(traffic.generated_tokens)
        metrics["perf/generate_time"] = traffic.seconds
        if traffic.seconds:
            metrics["perf/tokens_per_second"] = traffic.generated_tokens / traffic.seconds
        progress.line(step + 1, metrics)
        found.append(metrics)
    return found


async def evaluate_job(resolved: Resolved, checkpoint: Path | None) -> dict[str, Metrics]:
    """Evaluate a Hugging Face checkpoint in the engine alone, or one of miles through the trainer and a weight sync."""
    config, registry = resolved.config, resolved.registry
    registry.plugins.hook.miles_configure(config=config)
    ours = None
    if checkpoint is not None and _is_ours(checkpoint):
        ours = find_checkpoint(checkpoint)
    elif checkpoint is not None:
        config = _changed(config, "model", hf_checkpoint=str(checkpoint))
    async with _ready_for_work(config, Interrupt()) as stack:
        parts = await evaluation_parts(config, registry, stack, ours)
        return await parts.evaluator.evaluate(parts, ours.step if ours else 0)


def _changed(config: Config, section: str, **values: Any) -> Config:
    """The same with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _is_ours(path: Path) -> bool:
    """Whether a path is a checkpoint, a folder of checkpoints, or a run directory of miles."""
    return (path / MANIFEST).exists() or (path / "checkpoints").is_dir() or any(path.glob(f"step_*/{MANIFEST}"))


def _in_event_loop(job: Coroutine[Any, Any, T]) -> T:
    """Run a job to its end, also from inside a running event loop (a notebook), then in a thread of its own."""
    speak()
    running = True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    if not running:  # out here, an error of the job has no other one before it
        return asyncio.run(job)
    with ThreadPoolExecutor(1, thread_name_prefix="miles") as thread:
        return thread.submit(asyncio.run, job).result()
