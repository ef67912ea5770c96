"""Tracker `wandb`: metrics to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

from miles.api import ConfigError, Metrics, RunInfo
from miles_wandb.plugin import WandbOptions

ID_FILE = "wandb_run_id"


class WandbTracker:
    """One miles run is one wandb run, however often it was resumed: its id is kept in the run directory.

    Steps that a resumed run repeats are the same steps again; wandb keeps the first account of them.
    """

    def __init__(self, options: WandbOptions):
        self.options = options
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Raises ConfigError when wandb cannot start: no network, no login."""
        options = self.options
        directory = Path(options.dir) if options.dir else run.directory
        directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"base_url": options.host} if options.host else {}
        try:
            self._run = wandb.init(
                project=options.project,
                entity=options.team,
                group=options.group,
                name=run.name,
                id=self._run_id(run),
                resume="allow",
                mode=options.mode,
                config=dict(run.config),
                dir=directory,
                tags=list(options.tags) or None,
                settings=wandb.Settings(**settings),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"tracking: wandb could not start: {error}. Log in with `wandb login` or WANDB_API_KEY, or write the "
                "run to disk with --wandb-mode offline"
            ) from error
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / ID_FILE).write_text(self._run.id + "\n", encoding="utf-8")

    def _run_id(self, run: RunInfo) -> str | None:
        """The id that was asked for, else that of the run which is resumed; None for a new one."""
        kept = run.directory / ID_FILE
        if self.options.run_id or run.resumed_from is None or not kept.is_file():
            return self.options.run_id
        return kept.read_text(encoding="utf-8").strip() or None

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def finish(self, status: str) -> None:
        """A run that did not complete is shown as failed, and can be resumed."""
        if self._run is None:
            return
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "completed" else 1)
        self._run = None
