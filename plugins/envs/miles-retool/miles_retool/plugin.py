"""Registers the environment `retool` and the reward of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from miles.api import Component, ConfigError, hookimpl
from miles_retool.sandbox.layers import PROTECTS
from miles_retool.sandbox.limits import Limits

MILES_API = 1


@dataclass(frozen=True)
class RetoolOptions:
    """How code is written, and what it may use."""

    protocol: Literal["tools", "text"] = "tools"
    """`tools`: calls of the function code_interpreter, in the notation of the model's family. `text`: <code>...</code>
    or a block of ```python in the model's turn, answered between <interpreter> tags, until `Answer: \\boxed{...}`."""
    instructions: str | None = None
    """With `text`, the system message that explains it, in place of ours; empty for none."""
    max_tool_calls: int = 16
    """Programs of one trajectory; later ones are not run, and the model is told."""
    max_result_length: int = 4000
    """Characters of a result that the model is shown."""
    concurrency: int = 32
    """Programs at the same time, of all trajectories."""
    packages: tuple[str, ...] = ()
    """Modules that programs may import besides the standard library, with what these import: numpy, sympy."""
    require: tuple[str, ...] = tuple(PROTECTS)
    """What must be protected from programs, or nothing is run: files, network, processes."""
    seconds: float = 120.0
    """Wall time of one program; CPU time of each of its processes."""
    memory_mb: int = 1024
    """Private memory of all its processes, in MiB."""
    processes: int = 32
    """Its processes and threads at the same time."""
    file_mb: int = 16
    """Each of its files, in MiB."""
    disk_mb: int = 64
    """All of its files, in MiB; with namespaces only."""
    open_files: int = 64
    """In one of its processes."""
    output_kb: int = 64
    """KiB of output; a program that says more is stopped."""

    def __post_init__(self) -> None:
        faults = self.limits.faults()
        for name in ("max_tool_calls", "max_result_length", "concurrency"):
            faults += [f"{name}={getattr(self, name)} (at least 1)"] * (getattr(self, name) < 1)
        faults += [f"require: {name!r} (of {', '.join(PROTECTS)})" for name in self.require if name not in PROTECTS]
        if faults:
            raise ConfigError(f"retool: {'; '.join(faults)}")

    @property
    def limits(self) -> Limits:
        """Of one program."""
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})


@dataclass(frozen=True)
class RetoolRewardOptions:
    """What an answer is worth."""

    correct: float = 1.0
    wrong: float = -1.0
    per_call: float = 0.05
    """Added to a wrong answer for each program that was run."""
    most_when_wrong: float = -0.6
    """A wrong answer is worth no more than this, however many programs were run."""
    require_boxed: bool = True
    """Only an answer in \\boxed{} counts; otherwise the last formula or number of the last message does."""
    timeout: float = 5.0
    """Seconds for one comparison; what takes longer is wrong."""
    workers: int = 2
    """Processes that compare."""

    def __post_init__(self) -> None:
        if not self.wrong <= self.most_when_wrong < self.correct or self.per_call < 0:
            raise ConfigError(
                f"retool: wrong={self.wrong}, most_when_wrong={self.most_when_wrong} and correct={self.correct} must "
                f"rise, and per_call={self.per_call} be at least 0"
            )
        if self.timeout <= 0 or self.workers < 1:
            raise ConfigError(f"retool: timeout={self.timeout} must be positive and workers={self.workers} at least 1")


@hookimpl
def miles_register_environments() -> Mapping[str, Component]:
    return {
        "retool": Component(
            "miles_retool.environment:Retool",
            options=RetoolOptions,
            flags={
                "--retool-protocol": "protocol",
                "--retool-max-tool-calls": "max_tool_calls",
                "--retool-concurrency": "concurrency",
                "--retool-seconds": "seconds",
                "--retool-memory-mb": "memory_mb",
            },
            summary="A Python interpreter in a sandbox, as a tool or between tags",
            paper="arXiv:2504.11536",
        )
    }


@hookimpl
def miles_register_rewards() -> Mapping[str, Component]:
    return {
        "retool": Component(
            "miles_retool.reward:RetoolReward",
            options=RetoolRewardOptions,
            summary="1 for the right answer, -1 for a wrong one and a little more for each program that was run",
            paper="arXiv:2504.11536",
        )
    }
