"""A folder of rollout batches: `step_000001.npz` and on, and `dump.json`, which says of which experiment they are.

`miles train --dump-rollouts FOLDER` writes one beside its training, `miles rollout --dump FOLDER` without any, and
`miles train --replay FOLDER` trains on one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from miles.config import Config
from miles.durable import fresh_file
from miles.errors import ConfigError, DataError, RolloutError
from miles.rollout.saved import write_groups
from miles.rundir import differences
from miles.types import Group

ABOUT = "dump.json"
FORMAT = "miles dump 1"


def batch_file(folder: Path, step: int) -> Path:
    """Of the batch of a step; the first is 1."""
    return folder / f"step_{step:06d}.npz"


def count_batches(folder: Path) -> int:
    """How many there are from step 1 on, without a gap."""
    return sum(1 for _ in takewhile(lambda step: batch_file(folder, step).is_file(), count(1)))


class Dump:
    """The writing side."""

    def __init__(self, folder: Path, maker: str, config: Config, weights: str = ""):
        """`maker`: `miles train` or `miles rollout`; `weights`: which ones generate, where `model.hf_checkpoint` does
        not say.

        Raises:
            ConfigError: the folder holds batches of something else, or cannot be written.
        """
        self.folder = folder
        settings = config.model_dump(mode="json")
        self.about: dict[str, Any] = {"format": FORMAT, "maker": maker, "weights": weights, "settings": settings}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / ABOUT).is_file():
                self._check(read_about(folder))
            elif batch_file(folder, 1).exists():
                raise ConfigError(f"{folder} holds batches, and no {ABOUT} says of what; choose another folder")
            else:
                self._note(0, None)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"rollout.dump {folder} cannot be written: {reason}; choose another folder") from error

    def _check(self, there: Mapping[str, Any]) -> None:
        then, now = ({"maker": it["maker"], "weights": it["weights"], **it["settings"]} for it in (there, self.about))
        if odd := differences(then, now):
            raise ConfigError(
                f"{self.folder} holds rollouts of another experiment:{odd}\nChoose another folder, or delete this one"
            )
        self.batches, self.producer = there["batches"], there["producer"]

    async def write(self, step: int, groups: Sequence[Group], producer: Any = None) -> None:
        """Write the batch of a step, the first being 1, and the state of the producer to go on after it. Batches of
        later steps, which an earlier life of this run has left, go.

        Raises:
            DataError: something in a sample cannot be written down.
            RolloutError: the disk is full or not writable.
        """
        try:
            await asyncio.to_thread(self._write, step, groups, producer)
        except OSError as error:
            raise RolloutError(
                f"the batch of step {step} could not be written to {self.folder}: {error.strerror or error}. Free some "
                "space, or choose another folder"
            ) from error

    def _write(self, step: int, groups: Sequence[Group], producer: Any) -> None:
        for later in takewhile(Path.exists, (batch_file(self.folder, number) for number in count(step + 1))):
            later.unlink()
        write_groups(batch_file(self.folder, step), groups)
        if producer is not None:
            self._note(step, producer)

    def _note(self, batches: int, producer: Any) -> None:
        self.batches, self.producer = batches, producer
        with fresh_file(self.folder / ABOUT) as file:
            text = json.dumps({**self.about, "batches": batches, "producer": producer}, indent=1)
            file.write(text.encode())


def read_about(folder: Path) -> dict[str, Any]:
    """What `dump.json` says.

    Raises:
        DataError: it is missing, damaged, or of another version.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["format"] == FORMAT:
            return about
        raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no rollouts: it has no {ABOUT}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / ABOUT} cannot be read: {error}") from error
