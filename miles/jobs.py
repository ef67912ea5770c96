"""The jobs that a person starts: training and evaluation, from the command line or from Python."""

from __future__ import annotations

import asyncio
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
from miles.config import Config, RewardSpec, Spec
from miles.config.load import resolve
from miles.determinism import prepare_process
from miles.errors import RunInterrupted
from miles.log import logger
from miles.loop import train as train_loop
from miles.plugins import Plugins, load_plugins
from miles.protocols import RunInfo
from miles.registry import Registry
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
    loaded = load_plugins(extra=plugins)
    files, overrides = ((), config) if isinstance(config, Mapping) else (_as_paths(config), None)
    resolved = resolve(files, _as_arguments(flags), loaded, overrides=overrides)
    registry = Registry(loaded)
    settled = resolved.config
    if reward is not None:
        registry.add("rewards", PYTHON_REWARD, reward)
        settled = _with_reward(settled, Spec(name=PYTHON_REWARD))
    return _in_event_loop(run_job(settled, loaded, registry))


def run_training(config: Config, plugins: Plugins) -> Run:
    """The job of `miles train`."""
    return _in_event_loop(run_job(config, plugins, Registry(plugins)))


def run_evaluation(config: Config, plugins: Plugins, checkpoint: Path | None = None) -> dict[str, Metrics]:
    """The job of `miles eval`: every eval set on a checkpoint, of miles or of Hugging Face."""
    return _in_event_loop(evaluate_job(config, plugins, Registry(plugins), checkpoint))


async def run_job(config: Config, plugins: Plugins, registry: Registry) -> Run:
    """Build, restore, train, and leave a run directory that says how it went.

    Raises:
        RunInterrupted: a signal asked to stop; the state is saved.
    """
    plugins.hook.miles_configure(config=config)
    prepare_process(config.run)
    _prepare_directory(config, plugins)
    tracking = Tracking([(spec.name, registry.build("trackers", spec)) for spec in config.tracking])
    derived, parts = await build(config, plugins, registry, tracking)
    run = Run(config, derived, parts)
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
    return run


async def evaluate_job(
    config: Config, plugins: Plugins, registry: Registry, checkpoint: Path | None
) -> dict[str, Metrics]:
    """Evaluate a Hugging Face checkpoint in the engine alone, or one of miles through the trainer and a weight sync."""
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
    derived, parts = await build(config, plugins, registry, Tracking([]))
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


# -------------------------------------------------------------------------------------------------------- from Python


def _as_paths(config: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    return (Path(config),) if isinstance(config, str | Path) else tuple(Path(path) for path in config)


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """`lr=1e-5` as `--lr 1e-5`, as if it had been typed."""
    arguments = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)
            arguments += [f"--{flag}", text]
    return arguments


def _with_reward(config: Config, spec: Spec) -> Config:
    """The same config with this reward alone in every task set."""
    reward = (RewardSpec(name=spec.name),)
    update: dict[str, Any] = {}
    for name in ("data", "eval"):
        section = getattr(config, name)
        sets = tuple(task_set.model_copy(update={"reward": reward}) for task_set in section.sets)
        update[name] = section.model_copy(update={"sets": sets})
    return config.model_copy(update=update)


def _in_event_loop(job: Coroutine[Any, Any, T]) -> T:
    """Run a job to its end, also from inside a running event loop (a notebook), then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1, thread_name_prefix="miles") as thread:
        return thread.submit(asyncio.run, job).result()
