"""Results do not change with the number of ranks."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

import miles
from miles.build import load_model, rollout_temperature, train_models
from miles.checkpoint_io import read_weights
from miles.config.derived import Derived
from miles.config.load import resolve
from miles.crew import launch_train, make_crew
from miles.plugins import load_plugins
from miles.report.compare import compare
from miles.training.trainer import Trainer
from miles.types import LOSS_MASK, ROLLOUT_LOG_PROBS, Group, Prompt, Sample, Status


def groups_of(dump: Path) -> list[Group]:
    """The samples of a step's dump, as training got them."""
    groups: dict[int, Group] = {}
    for record in map(json.loads, dump.read_text().splitlines()):
        start = record["prompt_length"]
        prompt = Prompt(
            id=record["prompt_id"], task_set=record["task_set"], text=record["prompt"], tokens=record["tokens"][:start]
        )
        sample = Sample.begin(prompt, id=record["id"], group_id=record["group_id"])
        sample.append(
            record["tokens"][start:],
            {LOSS_MASK: record["loss_mask"][start:], ROLLOUT_LOG_PROBS: record["rollout_log_probs"][start:]},
        )
        sample.reward, sample.status = record["reward"], Status(record["status"])
        groups.setdefault(sample.group_id, Group(sample.group_id, prompt, [])).samples.append(sample)
    return list(groups.values())


def replayed(config, dumps, ranks, folder):
    """Weights, and metrics of each step, after training on these dumps."""
    changes = {
        "resources.executor": "local",
        "resources.actor_num_gpus_per_node": ranks,
        "train.dtype": "fp32",
        "run.dir": str(folder),
    }
    resolved = resolve([config], (), load_plugins(), overrides=changes)
    config, registry = resolved.config, resolved.registry

    async def train():
        async with AsyncExitStack() as stack:
            derived = Derived.of(config)
            crew = make_crew(config, registry, stack, trains=True)
            models = train_models(config, derived, registry, load_model(config, registry))
            workers = await launch_train(crew, models, rollout_temperature(config), stack)
            trainer = Trainer(config, derived, registry, workers, await workers.call("data_share"))
            metrics = [await trainer.step(groups_of(dump)) for dump in dumps]
            await workers.call("export_hf", folder / "hf")
            return metrics

    metrics = asyncio.run(train())
    return {n: t for group in read_weights(folder / "hf") for n, t in group.items()}, metrics


def test_a_replayed_dump_in_float64(config, tmp_path):
    config["train"]["max_tokens_per_gpu"] = 64
    config["rollout"]["num_rollout"] = 4
    miles.train(config)
    config["data"]["sets"][0]["reward"] = config["eval"]["sets"][0]["reward"] = (
        "exact_match"  # what nobody will ask for
    )
    dumps = sorted((tmp_path / "run" / "rollouts").iterdir())
    (one, first), (two, second), (four, third) = (
        replayed(config, dumps, ranks, tmp_path / f"ranks-{ranks}") for ranks in (1, 2, 4)
    )
    assert next(iter(one.values())).dtype == torch.float32
    for weights in (two, four):
        for name, tensor in one.items():
            torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)
    for metrics in (second, third):
        for before, after in zip(first, metrics, strict=True):
            for name in before.keys() - {"perf/workers_time"}:
                assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-4), name


def run_on(config, tmp_path, ranks, **flags):
    folder = tmp_path / f"run-{ranks}"
    executor = "inprocess" if ranks == 1 else "local"
    return miles.train(
        config, run_dir=str(folder), executor=executor, actor_num_gpus_per_node=ranks, save_hf="hf", **flags
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_of_several_ranks_is_that_of_one(config, tmp_path, ranks):
    """The same tokens, and the same numbers to rounding."""
    config["rollout"]["num_rollout"] = 4
    for count in (1, ranks):
        run_on(config, tmp_path, count)
    found = compare(tmp_path / "run-1", tmp_path / f"run-{ranks}")
    assert found.first_token is None, found.first_token
    assert found.within(1e-5)
    assert found.weights < 1e-5
