"""Tasks of OpenReward environments as prompt files, and the task sets that train on them.

    python -m miles_openreward.prepare_tasks --config train_config.yaml --output tasks
    miles train tasks/tasks.yaml ...

For each environment of the config this writes `ENVIRONMENT.jsonl`, a row a task, and one `ENVIRONMENT.SPLIT.jsonl` for
each of its `eval_splits`; and `tasks.yaml`, which makes task sets of them. A row is

    {"prompt": "owner/name train 17", "label": null, "metadata": {"task_spec": {...}, "split": "train", ...}}

What is asked is not in it: the environment says that when its session is opened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import aiohttp
import yaml
from openreward.api.environments.client import AsyncEnvironment
from openreward.api.environments.types import AuthenticationError, Task
from openreward.api.errors import OpenRewardError
from pydantic import BaseModel, Field, ValidationError, field_validator

from miles.api import ConfigError, DataError, MilesError
from miles_openreward.plugin import OpenRewardOptions
from miles_openreward.sessions import connection

AT_ONCE = 16
"""Tasks that are asked for one by one, of an environment that does not list them."""
Secrets = Mapping[str, None]
"""Names; their values are in environment variables and nowhere else."""


class EnvironmentConfig(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """One environment of `train_config.yaml`."""

    splits: tuple[str, ...] = Field(("train",), min_length=1)
    """Splits whose tasks are trained on."""
    eval_splits: tuple[str, ...] = ()
    """Splits that are evaluated on, greedily, each as a set of its own."""
    num_samples: int | None = Field(None, gt=0)
    """Tasks of each split, drawn at random; all when not given."""
    nonterminal_reward: float | None = None
    reward_reduction: Literal["sum", "mean", "max", "min"] = "sum"
    min_reward: float | None = None
    max_reward: float | None = None
    max_turns: int = Field(20, gt=0)
    secrets: Secrets = {}
    base_url: str | None = None
    """Server of your own; openreward.ai when not given."""
    variant: str | None = None
    """Which of the environments that are served there; by default the one of this name on a server of your own, and the
    first one on openreward.ai."""

    @field_validator("secrets", mode="before")
    @classmethod
    def _names_only(cls, secrets: Any) -> Any:
        return names_only(secrets)


class TrainConfig(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """`train_config.yaml`, as OpenReward's own recipes have it."""

    environments: dict[str, EnvironmentConfig] = Field(min_length=1)
    """Name -> what of it: `owner/name` on openreward.ai, the name of its class on a server of your own."""
    secrets: Secrets = {}
    """For all environments."""
    system_prompt_template: str | None = None
    thinking: bool = False
    """Whether the chat template lets the model think first."""
    openreward_run_name: str | None = None
    """Upload trajectories under this name."""

    @field_validator("secrets", mode="before")
    @classmethod
    def _names_only(cls, secrets: Any) -> Any:
        return names_only(secrets)


def names_only(secrets: Any) -> Any:
    """Refuses a value, without repeating it."""
    named = [name for name, value in secrets.items() if value is not None] if isinstance(secrets, dict) else []
    if named:
        raise ConfigError(
            f"secrets: {', '.join(named)} has a value, and no file should. Leave it out ({named[0]}: null), "
            f"and set the environment variable {named[0].upper()}"
        )
    return secrets


def read_config(path: Path) -> TrainConfig:
    """Raises ConfigError: no such file, no YAML, or something in it that cannot be."""
    try:
        with path.open("rb") as file:  # not its text: of a file, errors of YAML name the place and quote nothing
            return TrainConfig.model_validate(yaml.safe_load(file))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise ConfigError(f"{path}: " + "; ".join(wrong)) from error


# ---------------------------------------------------------------------------------------------------------------- rows


async def rows_of(name: str, config: EnvironmentConfig, split: str, seed: int) -> list[dict[str, Any]]:
    """The rows of a split.

    Raises:
        ConfigError: it is on openreward.ai, and there is no key.
        DataError: the environment cannot be reached, or it has no such split, or nothing in it.
    """
    OpenRewardOptions(base_url=config.base_url).confidential()  # a key, where one is needed
    variant = config.variant or (name.lower() if config.base_url else None)
    environment = connection(config.base_url).api.get(name, variant=variant)
    where = f"environment {name!r} at {config.base_url or 'openreward.ai'}"
    try:
        if split not in (splits := await environment.list_splits()):
            raise DataError(f"{where} has no split {split!r}; it has {', '.join(splits)}")
        tasks = await tasks_of(environment, split, config.num_samples, random.Random(f"{seed} {name} {split}"))
    except (aiohttp.ClientError, OSError, OpenRewardError, AuthenticationError) as error:
        raise DataError(f"{where}: {type(error).__name__}: {error}") from error
    if not tasks:
        raise DataError(f"{where}: its split {split!r} is empty")
    return [
        {
            "prompt": f"{name} {split} {index}",
            "label": None,
            "metadata": {**asdict(task), "variant": variant, "split": split, "index": index},
        }
        for index, task in tasks.items()
    ]


async def tasks_of(
    environment: AsyncEnvironment, split: str, count: int | None, draw: random.Random
) -> dict[int, Task]:
    """Index -> task, in order: all of them, or `count` at random."""
    try:
        listed = await environment.list_tasks(split)
    except aiohttp.ClientResponseError as error:
        if error.status != HTTPStatus.BAD_REQUEST:
            raise
        return await tasks_one_by_one(environment, split, count, draw)  # it has too many to list them
    return {index: listed[index] for index in chosen(len(listed), count, draw)}


async def tasks_one_by_one(
    environment: AsyncEnvironment, split: str, count: int | None, draw: random.Random
) -> dict[int, Task]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(index: int) -> Task:
        async with places:
            return await environment.get_task(split, index)

    indices = chosen(await environment.num_tasks(split), count, draw)
    return dict(zip(indices, await asyncio.gather(*map(one, indices)), strict=True))


def chosen(total: int, count: int | None, draw: random.Random) -> list[int]:
    return list(range(total)) if count is None or count >= total else sorted(draw.sample(range(total), count))


# ----------------------------------------------------------------------------------------------------------- task sets


def task_set(name: str, path: Path, config: EnvironmentConfig, train: TrainConfig) -> dict[str, Any]:
    """A task set of a config of miles."""
    options = {
        "base_url": config.base_url,
        "secrets": sorted({*train.secrets, *config.secrets}),
        "system_prompt_template": train.system_prompt_template,
        "run_name": train.openreward_run_name,
    }
    rules = config.model_dump(include={"nonterminal_reward", "reward_reduction", "min_reward", "max_reward"})
    return {
        "name": name,
        "path": str(path),
        "keys": {"input": "prompt"},
        "environment": {"name": "openreward", **given(options)},
        "reward": {"name": "openreward", **given(rules)},
        "max_turns": config.max_turns,
    }


class Readable(yaml.SafeDumper):
    """Text of several lines in several lines."""


Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value not in (None, [])}


def set_name(environment: str) -> str:
    """`GeneralReasoning/WhoDunit` -> `GeneralReasoning_WhoDunit`: a name for metrics, flags and files."""
    return re.sub(r"\W+", "_", environment)


async def prepare(train: TrainConfig, output: Path, seed: int) -> dict[str, Any]:
    """Write all files; returns what is in `tasks.yaml`.

    Raises:
        ConfigError: two environments would have files of one name.
        DataError: see `rows_of`.
    """
    names = {environment: set_name(environment) for environment in train.environments}
    if len(set(names.values())) < len(names):
        raise ConfigError(f"environments: their names differ in punctuation alone: {', '.join(names)}")
    output.mkdir(parents=True, exist_ok=True)
    training, evaluation = [], []
    for environment, config in train.environments.items():
        name = names[environment]
        rows = [row for split in config.splits for row in await rows_of(environment, config, split, seed)]
        write(output / f"{name}.jsonl", rows)
        training.append({**task_set(name, output / f"{name}.jsonl", config, train), "weight": len(rows)})
        for split in config.eval_splits:
            path = output / f"{name}.{split}.jsonl"
            write(path, await rows_of(environment, config, split, seed))
            evaluation.append({**task_set(f"{name}_{split}", path, config, train), "sampling": {"temperature": 0}})
    prepared: dict[str, Any] = {
        "data": {"chat_template_kwargs": {"enable_thinking": train.thinking}, "sets": training},
        "eval": {"sets": evaluation},
    }
    if not evaluation:
        del prepared["eval"]
    (output / "tasks.yaml").write_text(yaml.dump(prepared, Dumper=Readable, sort_keys=False, width=120), "utf-8")
    return prepared


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("train_config.yaml"), help="environments, and what of them")
    parser.add_argument("--output", type=Path, default=Path("tasks"), help="folder to write")
    parser.add_argument("--seed", type=int, default=42, help="of the tasks that num_samples draws")
    parsed = parser.parse_args(arguments)
    try:
        asyncio.run(prepare(read_config(parsed.config), parsed.output, parsed.seed))
    except MilesError as error:
        print(f"prepare_tasks: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
