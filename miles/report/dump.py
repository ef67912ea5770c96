"""Samples on disk: `rollouts/step_NNNNNN.jsonl` of a run directory, a sample a line, written when its step ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.environments import ENVIRONMENT_INFO
from miles.rundir import plain
from miles.types import Sample

FOLDER = "rollouts"


def dump_samples(
    directory: Path, step: int, samples: Sequence[Sample], learned: Mapping[int, Mapping], limit: int | None = None
) -> None:
    """Write the samples of a step, the first `limit` of them, an object that is listed twice once.

    `learned`: sample id -> what training made of it, `advantages` `[T]` and `loss`.
    """
    samples = list({id(sample): sample for sample in samples}.values())[:limit]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"step_{step:06d}.jsonl").open("w", encoding="utf-8", errors="replace") as file:
        for sample in samples:
            record = sample_record(sample, learned.get(sample.id, {}))
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def sample_record(sample: Sample, learned: Mapping[str, Any]) -> dict[str, Any]:
    """What a person needs to understand a sample; wide columns are left out."""
    prompt = sample.prompt
    info = sample.metadata.get(ENVIRONMENT_INFO)
    columns = {name: values for name, values in sample.columns.items() if values.ndim == 1}
    if "advantages" in learned:
        columns["advantages"] = learned["advantages"]
    told = {
        "id": sample.id,
        "group_id": sample.group_id,
        "rollout_id": sample.rollout_id,
        "prompt_id": prompt.id,
        "task_set": prompt.task_set,
        "prompt": prompt.text if prompt.messages is None else prompt.messages,
        "response": sample.text,
        "label": prompt.label,
        "status": sample.status.value,
        "reward": sample.reward,
        "reward_parts": sample.reward_parts,
        "loss": _number(learned.get("loss")),
        "error": sample.error,
        **({} if info is None else {"environment": info}),
        "prompt_length": sample.prompt_length,
        "turns": [{k: v for k, v in vars(turn).items() if not k.endswith("seconds")} for turn in sample.turns],
    }
    return {
        **plain(told),  # numbers and keys that JSON does not know come from data, rewards and environments
        "tokens": sample.tokens,
        **{name: [_number(v) for v in values.tolist()] for name, values in columns.items()},
    }


def _number(value: float | None) -> float | None:
    """Five decimals; JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else round(value, 5)
