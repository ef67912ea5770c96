"""Training on batches that are there: the producer of `miles train --replay FOLDER`. Nothing is generated."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from miles.config import Config
from miles.errors import ConfigError, DataError
from miles.rollout.dump import batch_file, count_batches, read_about
from miles.rollout.ledger import TRAINED
from miles.rollout.producer import Batches, trained_rollouts
from miles.rollout.saved import read_groups
from miles.types import Group, Metrics


class Replay(Batches):
    """Stands where a producer does, and hands out the batches of a dump in their order. It is its own source: as many
    prompts as the batches of a run have."""

    def __init__(self, config: Config):
        """Errors as of `batches_to_replay`."""
        super().__init__()
        self.config, self.batches = config, batches_to_replay(config)
        self.source, self.groups, self.lost = self, (), ()
        assert config.rollout.replay is not None
        self.on_policy = _on_policy(read_about(config.rollout.replay))

    def __len__(self) -> int:
        return self.batches * self.config.rollout.batch_size

    async def collect(self, step: int) -> list[Group]:
        """The batch that was trained in step `step + 1`.

        Raises:
            DataError: its file is missing or damaged, or has another number of groups than `rollout.batch_size`.
        """
        folder, wanted = self.config.rollout.replay, self.config.rollout.batch_size
        assert folder is not None
        path = batch_file(folder, step + 1)
        groups = await asyncio.to_thread(read_groups, path)
        if len(groups) != wanted:
            raise DataError(f"{path} holds {len(groups)} groups, and rollout.batch_size is {wanted}")
        self.handed = trained_rollouts(groups)
        self.ledger.start(self.handed)
        self.ledger.settle(self.handed, TRAINED)
        return groups

    def metrics(self) -> Metrics:
        return {"rollout/samples/trained": float(len(self.handed))}


def batches_to_replay(config: Config) -> int:
    """How many batches `rollout.replay` holds.

    Raises:
        ConfigError: they are fewer than the run has steps, or were drawn otherwise than this run takes them to be.
        DataError: the folder holds none.
    """
    rollout, folder = config.rollout, config.rollout.replay
    assert folder is not None
    about, there = read_about(folder), count_batches(folder)
    if not there:
        raise DataError(f"{folder} holds no {batch_file(folder, 1).name}: no step of its run was finished")
    steps = rollout.num_rollout
    if steps is not None and steps > there:
        raise ConfigError(f"rollout.num_rollout={steps}, and {folder} holds {there} batches: --num-rollout {there}")
    for name, then, now in (
        ("rollout.batch_size", about["settings"]["rollout"]["batch_size"], rollout.batch_size),
        ("the temperature", *map(_temperatures, (about["settings"], config.model_dump(mode="json")))),
    ):
        if then != now:
            raise ConfigError(f"{name} is {now}, and the batches of {folder} were made with {then}: give the same")
    return there


def _on_policy(about: Mapping[str, Any]) -> bool:
    sections = {name: about["settings"][name] for name in ("rollout", "weight_sync")}
    return about["maker"] == "miles train" and Config.model_validate(sections).on_policy


def _temperatures(settings: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(one["sampling"]["temperature"]) for one in settings["data"]["sets"]}))
