"""The jobs that a person starts: training and evaluation, from the command line or from Python."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import yaml

from miles.build import build, evaluation_parts
from miles.checkpoint import MANIFEST, find_checkpoint
from miles.config import Config
from miles.config.load import Resolved, plugin_wishes, resolve
from miles.determinism import prepare_process
from miles.errors import RunInterrupted
from miles.log import logger
from miles.loop import train as train_loop
from miles.plugins import Plugins, load_plugins
from miles.protocols import RunInfo
from miles.run import Run
from miles.tracking import Tracking
from miles.types import Metrics

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
    return _in_event_loop(run_job(resolved))


def run_training(resolved: Resolved) -> Run:
    """The job of `miles train`."""
    return _in_event_loop(run_job(resolved))


def run_evaluation(resolved: Resolved, checkpoint: Path | None = None) -> dict[str, Metrics]:
    """The job of `miles eval`: every eval set on a checkpoint, of miles or of Hugging Face."""
    return _in_event_loop(evaluate_job(resolved, checkpoint))


async def run_job(resolved: Resolved) -> Run:
    """Build, restore, train, and leave a run directory that says how it went.

    Raises:
        RunInterrupted: a signal asked to stop; the state is saved.
    """
    config, registry, plugins = resolved.config, resolved.registry, resolved.registry.plugins
    plugins.hook.miles_configure(config=config)
    prepare_process(config.run)
    _prepare_directory(config, plugins)
    tracking = Tracking([(spec.name, registry.build("trackers", spec)) for spec in config.tracking])
    derived, parts = await build(config, registry, tracking)
    run = Run(config, derived, parts)
    _settle_garbage()
    error: BaseException | None = None
    try:
        await run.restore()
        tracking.start(RunInfo(config.run.name, config.run.dir, config.model_dump(mode="json"), run.resumed_from))
        plugins.hook.miles_on_run_start(run=run)
        with run.interrupt.listening():
            await train_loop(run)
        run.status = "completed"
    except RunInterrupted as stop:
        error, run.status = stop, "interrupted"
        async with run.residency.training():
            path = await run.save()
        logger.warning("%s; saved %s: the same command goes on from there", stop, path)
        raise
    except BaseException as failure:
        error, run.status = failure, "failed"
        raise
    finally:
        run.write_summary()
        tracking.finish(run.status)
        plugins.hook.miles_on_run_end(run=run, error=error)
        await run.close()
        gc.unfreeze()  # whoever lets go of the run gets its memory back
    return run


async def evaluate_job(resolved: Resolved, checkpoint: Path | None) -> dict[str, Metrics]:
    """Evaluate a Hugging Face checkpoint in the engine alone, or one of miles through the trainer and a weight sync."""
    config, registry = resolved.config, resolved.registry
    prepare_process(config.run)
    if checkpoint is not None and not _is_ours(checkpoint):
        config = config.model_copy(update={"model": config.model.model_copy(update={"hf_checkpoint": str(checkpoint)})})
        checkpoint = None
    if checkpoint is None:
        live = await evaluation_parts(config, registry)
        try:
            return await live.evaluator.evaluate(live, 0)
        finally:
            await live.close()
    derived, parts = await build(config, registry, Tracking([]))
    run = Run(config, derived, parts)
    try:
        await run.read(find_checkpoint(checkpoint).path)
        await run.push_weights()
        return await run.evaluator.evaluate(run, run.step)
    finally:
        await run.close()


def _is_ours(path: Path) -> bool:
    """Whether a path is a checkpoint, a folder of checkpoints, or a run directory of miles."""
    return (path / MANIFEST).exists() or (path / "checkpoints").is_dir() or any(path.glob(f"step_*/{MANIFEST}"))


# ------------------------------------------------------------------------------------------------------ the directory


def _prepare_directory(config: Config, plugins: Plugins) -> None:
    """Create the run directory and write what describes the run. With `resume: never` an earlier run moves aside."""
    directory = config.run.dir
    if config.run.resume == "never" and directory.exists() and any(directory.iterdir()):
        aside = next(p for i in count(1) if not (p := directory.with_name(f"{directory.name}.old-{i}")).exists())
        shutil.move(directory, aside)
        logger.warning("--resume never: the earlier run in %s was moved to %s", directory, aside)
    directory.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (directory / "config.yaml").write_text(settings)
    (directory / "plugins.json").write_text(json.dumps(plugins.provenance(), indent=1) + "\n")


def _settle_garbage() -> None:
    """Take what imports and building have made out of the garbage collector's sight: it lives as long as the process,
    and looking through it again costs a third of a second every few steps."""
    gc.collect()
    gc.freeze()


def _in_event_loop(job: Coroutine[Any, Any, T]) -> T:
    """Run a job to its end, also from inside a running event loop (a notebook), then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1, thread_name_prefix="miles") as thread:
        return thread.submit(asyncio.run, job).result()
