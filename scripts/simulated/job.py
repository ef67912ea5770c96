"""A run of miles in which engine, tools, trainer and weight sync are simulated, and everything else is as ever."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulated.engine import EngineOptions
from simulated.trace import Trace
from simulated.training import Recorder, SimulatedTrainer, SyncOptions
from simulated.world import EchoOptions, ToolOptions

from miles.api import Component, hookimpl
from miles.bench.workbench import byte_tokenizer
from miles.build import build
from miles.config.load import resolve
from miles.plugins import load_plugins
from miles.run import Run
from miles.tracking import Tracking

PROMPTS = 200
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}<end>{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


class Simulated:
    """The plugin that offers what is simulated."""

    MILES_API = 1

    @hookimpl
    def miles_register_chat_formats(self) -> dict[str, Component]:
        return {"fixed": Component("simulated.world:FixedChat")}

    @hookimpl
    def miles_register_environments(self) -> dict[str, Component]:
        return {
            "slow_tools": Component("simulated.world:SlowTools", ToolOptions),
            "echo": Component("simulated.world:Echo", EchoOptions),
        }

    @hookimpl
    def miles_register_rollout_engines(self) -> dict[str, Component]:
        return {
            "simulated": Component("simulated.engine:SimulatedEngine", EngineOptions, provides=("responses",)),
            "instant": Component("simulated.instant:InstantEngine", provides=("responses",)),
        }

    @hookimpl
    def miles_register_weight_syncs(self) -> dict[str, Component]:
        return {"simulated": Component("simulated.training:SimulatedSync", SyncOptions)}

    @hookimpl
    def miles_register_executors(self) -> dict[str, Component]:
        return {"simulated": Component("simulated.training:SimulatedExecutor", provides=("one rank",))}


def settings(folder: Path, task: Mapping[str, Any], rollout: Mapping[str, Any], chat_format: str) -> dict[str, Any]:
    """A configuration; `task` and `rollout` are its task set and its section of that name."""
    return {
        "run": {"dir": str(folder / "run"), "report": False},
        "model": {"hf_checkpoint": str(checkpoint(folder))},
        "data": {
            "chat_format": chat_format,
            "sets": [{"path": str(prompts(folder)), "apply_chat_template": True, **task}],
        },
        "rollout": {"dump_samples": 0, **rollout},
        "algorithm": {"advantage_estimator": "grpo"},
        "weight_sync": {"transport": "simulated", "verify": "never"},
        "checkpoint": {"interval": 1_000_000},
        "resources": {"executor": "simulated", "device": "cpu"},
        "tracking": [],
    }


def checkpoint(folder: Path) -> Path:
    """Configuration and tokenizer of a model: nobody reads weights."""
    from transformers import Qwen3Config

    path, tokenizer = folder / "model", byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    Qwen3Config(num_hidden_layers=1, hidden_size=64, max_position_embeddings=131_072).save_pretrained(path)
    return path


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": f"task {number}", "label": "a"}) + "\n" for number in range(PROMPTS)))
    return path


class Silence(io.StringIO):
    """A terminal that nobody looks at."""

    def write(self, text: str) -> int:
        return len(text)


async def make_run(config: Mapping[str, Any], train_seconds: float, trace: Trace, stack: AsyncExitStack) -> Run:
    """The run, with a simulated trainer, telling `trace` what it does and nobody else."""
    resolved = resolve((config,), (), load_plugins(extra=[Simulated()]))
    derived, parts = await build(resolved.config, resolved.registry, Tracking([("trace", Recorder(trace))]), stack)
    trainer: Any = SimulatedTrainer(train_seconds, trace)
    run = Run(resolved.config, derived, replace(parts, trainer=trainer))
    run.progress.out = Silence()
    return run
