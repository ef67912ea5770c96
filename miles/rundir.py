"""The run directory: one run, one process, one experiment.

It describes the run (`config.yaml`, `plugins.json`), is held by one process at a time, and refuses to go on as another
experiment than the one that began in it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from miles import __version__
from miles.config import Config
from miles.errors import ConfigError, RunInterrupted
from miles.log import logger
from miles.plugins import Plugins

METRICS, SUMMARY, SETTINGS, LOCK = "metrics.jsonl", "summary.json", "config.yaml", ".lock"
FREE = (
    "run.dir", "run.name", "run.resume", "run.report", "rollout.num_rollout", "rollout.num_epoch",
    "rollout.dump_samples", "rollout.dump", "eval", "checkpoint", "tracking", "resources", "plugins",
    "weight_sync.verify", "weight_sync.tolerance", "weight_sync.transport", "weight_sync.buffer_size",
    "rollout.num_engines", "teacher.urls", "teacher.engine", "run.num_threads", "train.max_tokens_per_gpu",
    "train.log_probs_max_tokens_per_gpu", "train.micro_batch_size", "train.use_dynamic_batch_size", "train.balance",
    "train.log_probs_chunk_size", "train.gradient_checkpointing", "train.attention", "train.compile",
    "train.fsdp_reshard", "train.context_parallel_size", "train.max_nonfinite_steps", "train.max_oom_retries",
)  # fmt: skip
"""What may differ from the run that is resumed: how long, where, in how much memory, how closely watched; not what is
learned, but for rounding."""
LIBRARIES = ("torch", "transformers", "numpy", "sglang", "megatron-core", "ray")


@contextmanager
def run_directory(config: Config, plugins: Plugins) -> Iterator[Path]:
    """Make the directory ready and hold it.

    Raises:
        ConfigError: it cannot be written, another process holds it, or it holds another experiment.
    """
    directory = config.run.dir
    with ExitStack() as stack:
        try:
            if config.run.resume == "never":
                _move_aside(directory, config.checkpoint.dir)
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(directory))
            if config.run.resume != "never":
                _check_same_experiment(directory, config)
            settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (directory / SETTINGS).write_text(settings)
            (directory / "plugins.json").write_text(json.dumps(plugins.provenance(), indent=1) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"run.dir {directory} cannot be written: {reason}; choose another with --run-dir"
            ) from error
        yield directory


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock that ends with this process, however it ends."""
    with (directory / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"run.dir {directory} is in use by process {file.read().strip() or '?'}; wait for it, or choose "
                "another with --run-dir"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _move_aside(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            aside = next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
            shutil.move(folder, aside)
            logger.warning("--resume never: %s of an earlier run was moved to %s", folder, aside)


def _check_same_experiment(directory: Path, config: Config) -> None:
    """Refuse to mix two experiments in one directory, or to write over one that cannot be gone on with."""
    path, summary = directory / SETTINGS, directory / SUMMARY
    checkpoints = config.checkpoint.dir or directory / "checkpoints"
    saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    if not path.exists() or not (saved or _has_trained(directory)):
        return
    if lines := differences(yaml.safe_load(path.read_text()), config.model_dump(mode="json")):
        raise ConfigError(
            f"run.dir {directory} holds a run with other settings:{lines}\n"
            "Go on with the same ones, choose another --run-dir, or begin anew with --resume never, which keeps the "
            "earlier run aside"
        )
    if not saved and summary.exists() and json.loads(summary.read_text()).get("status") == "completed":
        raise ConfigError(
            f"run.dir {directory} holds a completed run, and {checkpoints} no checkpoint to go on from: give --save as "
            "it was then, choose another --run-dir, or begin anew with --resume never, which keeps the run aside"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A line for each setting in which two configurations differ that decides what is learned; empty for none."""
    past, present, fresh = (leaves(settings) for settings in (then, now, Config().model_dump(mode="json")))
    past = {key: fresh[key] for key in present if key in fresh} | past  # an older version knew fewer settings
    keys = [key for key in sorted({*past, *present}) if past.get(key) != present.get(key) and not _is_free(key)]
    return "".join(f"\n  {key}: {past.get(key)!r} then, {present.get(key)!r} now" for key in keys)


def _has_trained(directory: Path) -> bool:
    """Whether a run came beyond step 0 here, wherever it keeps its checkpoints."""
    path = directory / METRICS
    return path.exists() and len(path.read_text(encoding="utf-8").splitlines()) > 1


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value; empty mappings and lists are values."""
    if isinstance(value, list):
        value = dict(enumerate(value)) or value
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    parts = {f"{path}.{name}" if path else str(name): item for name, item in value.items()}
    return {key: leaf for part, item in parts.items() for key, leaf in leaves(item, part).items()}


def versions() -> dict[str, str]:
    """Of miles, Python and the libraries that decide results."""
    found = {"miles": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, with the time of now as the run's end."""
    directory.mkdir(parents=True, exist_ok=True)
    ended = datetime.now().astimezone().isoformat(timespec="seconds")
    fresh = directory / f"{SUMMARY}.new"  # a kill in between leaves the old one whole
    fresh.write_text(json.dumps(plain({**summary, "ended": ended}), indent=2) + "\n")
    os.replace(fresh, directory / SUMMARY)


def plain(value: Any) -> Any:
    """What JSON can hold: keys are text, a number that is not finite is None, what JSON does not know is its text."""
    if getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)


def note_failure(directory: Path, error: BaseException) -> None:
    """Say in `summary.json` what went wrong, also when it happened before there was a run."""
    path = directory / SUMMARY
    stopped = isinstance(error, RunInterrupted | KeyboardInterrupt)
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(error, RunInterrupted) and known.get("status") == "interrupted":
            return  # the run has said so
        known |= {"status": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"}
        write_summary(directory, known)
    except OSError as failure:
        logger.warning("%s cannot be written: %s", path, failure)
