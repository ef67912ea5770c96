"""What only the core knows, bundled for the components that need it: one context for each kind that has one.

They are built once, when a run is put together, and handed to components as the keyword `context` (a tracker gets its
`RunInfo` when it starts, a generate function its context with every call).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from miles.types import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from miles.config import Config, TaskSet
    from miles.config.optimizer import OptimizerSection
    from miles.protocols import Bridge, ChatFormat, Environment, ModelTransform, PrecisionScheme

Role = Literal["actor", "critic", "reference", "teacher"]


@dataclass(frozen=True)
class ChatContext:
    tokenizer: Any
    """A transformers tokenizer."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    """What the checkpoint's generation config says ends a response, besides the tokenizer's own end token."""


@dataclass(frozen=True)
class DataContext:
    sets: Sequence[TaskSet]
    chat: ChatFormat
    seed: int
    max_prompt_tokens: int | None
    """Longer prompts are dropped and counted."""
    shuffle: bool
    bad_lines: Literal["error", "skip"] = "error"
    """Whether a malformed row stops the run or is skipped and counted."""


@dataclass(frozen=True)
class EngineContext:
    checkpoint: Path
    """A Hugging Face checkpoint: config, tokenizer and (unless `load_weights` is False) weights."""
    hf_config: Any
    tokenizer: Any
    bridge: Bridge
    device: str
    dtype: str
    load_weights: bool
    """False when the first weight sync brings them before the first request."""
    run_dir: Path
    precision: PrecisionScheme | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    """Which of the run's engines it is."""
    gpus: int = 1
    """Accelerators of the engine, `device` and those after it; meaningless on a CPU."""
    shares: bool = False
    """A train rank works on the same accelerator."""
    sleeps: bool = False
    """It is put to sleep while the trainer works."""
    routed_experts: bool = False
    """Requests ask for the expert choices of their tokens."""
    exact: bool = False
    """An answer is to have the same bits whatever else is being generated, where the engine knows how."""


@dataclass
class GenerateContext:
    """What a generate function works with."""

    generate: Callable[[GenerateRequest], Any]
    """Awaitable: routes to an engine, counts, honours priority."""
    chat: ChatFormat
    sampling: SamplingParams
    make_environment: Callable[[], Environment] | None = None
    max_context_tokens: int | None = None
    max_turns: int = 16
    evaluation: bool = False
    routed_experts: bool = False


@dataclass(frozen=True)
class BackendContext:
    """What a train backend is built from, on one rank."""

    config: Config
    role: Role
    checkpoint: Path
    hf_config: Any
    bridge: Bridge
    precision: PrecisionScheme | None
    transforms: Sequence[ModelTransform]
    rank: int
    world_size: int
    device: str
    total_steps: int
    """Optimizer steps that this model will take in the whole run, for schedules."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax."""

    @property
    def optimizer(self) -> OptimizerSection:
        """How a model of this role learns."""
        policy = self.config.optimizer
        return self.config.critic.optimizer(policy) if self.role == "critic" else policy


@dataclass(frozen=True)
class SyncContext:
    """What a weight sync is built with."""

    checkpoint: Path
    """The policy's: config and tokenizer for checkpoints that it writes."""
    run_dir: Path
    buffer_size: int = 512 * 1024**2
    """Bytes sent at once, where weights travel in buckets."""
    timeout: float = 1800.0
    """Seconds after which the other side is taken to hang."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker needs to know of a run."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    resumed_from: int | None = None
