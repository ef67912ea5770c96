"""What each kind of component must be, in the order data flows through a run.

A component is whatever satisfies the protocol: a class, or a plain function where the protocol is one call. Classes
are built as `Target(options)` when the `Component` declares options and as `Target()` when it does not; a function
gets its options as the keyword `options`. Kinds whose protocol names a *context* also receive it, as the keyword
`context`: the typed bundle of what only the core knows (the model's config, a tokenizer, the run directory).

Nothing asynchronous is a hook; async work happens in methods of the objects built here. Every method that may be slow
in the driver is async; what runs inside a train worker is synchronous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from miles.contexts import BackendContext as BackendContext
from miles.contexts import ChatContext as ChatContext
from miles.contexts import DataContext as DataContext
from miles.contexts import EngineContext as EngineContext
from miles.contexts import GenerateContext, Role
from miles.contexts import RunInfo as RunInfo
from miles.contexts import SyncContext as SyncContext
from miles.execution import Executor as Executor
from miles.execution import ExecutorContext as ExecutorContext
from miles.execution import Seats as Seats
from miles.execution import WorkerGroup as WorkerGroup
from miles.parts import WHOLE, Part, Sharding
from miles.types import (
    Action,
    AdvantageInputs,
    Advantages,
    Correction,
    GenerateRequest,
    GenerateResult,
    Group,
    LossInputs,
    LossResult,
    Message,
    Metrics,
    MicroBatch,
    Observation,
    Outputs,
    PolicyLoss,
    Prompt,
    Sample,
    StepReport,
    StepResult,
    Verdict,
    WeightGroup,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from miles.config import Config, TaskSet


Want = Literal["log_probs", "entropy", "values", "logits"]
TrainPart = Literal["parameters", "gradients", "optimizer"]
RankPart = Literal["policy", "other models", "gradients", "optimizer"]
"""Of a train rank: parameters of the policy, those of reference, critic and teachers, and the rest of all of them."""
EnginePart = Literal["weights", "kv_cache", "graphs"]
PauseMode = Literal["abort", "retract", "in_place"]
LossFunction = Callable[[MicroBatch, Outputs], LossResult]
Weights = Iterable[WeightGroup]

# ------------------------------------------------------------------------------------------- the model and its names


@runtime_checkable
class Bridge(Protocol):
    """One model family: how its weights and its config are named in each world.

    The worlds are `hf` (the checkpoint on disk, the names that every other part of miles speaks), `torch` (the
    transformers module), `decoder` (the built-in engine's module) and those a backend plugin adds, such as `megatron`.
    A bridge lists its conversion ops once; loading and exporting are the same list read in two directions.
    `hf_config` is the transformers config object of the checkpoint; `part` is what one rank holds in that world.
    """

    def to_world(self, world: str, hf_config: Any, groups: Weights, part: Part = WHOLE) -> Iterator[WeightGroup]:
        """Checkpoint tensors in, the world's tensors out, streamed: each is yielded once all its parts arrived."""

    def from_world(self, world: str, hf_config: Any, groups: Weights, part: Part = WHOLE) -> Iterator[WeightGroup]:
        """The inverse, bit-exact. A yielded group is what an engine must load together (fused projections).
        With a `part` they are this rank's shards, under global names; `sharding` says how to put them together."""

    def sharding(self, hf_config: Any, name: str) -> Sharding:
        """How tensor parallelism divides the checkpoint tensor `name`."""

    def config_for(self, world: str, hf_config: Any) -> Mapping[str, Any]:
        """The model's dimensions under the names that world uses."""


@runtime_checkable
class ChatFormat(Protocol):
    """A family's conversation as tokens. Context: `ChatContext`.

    The promise that makes multi-turn training right: what the model produced is never tokenised again. `render_next`
    returns only the tokens that follow, and appending them to the stream equals what the family's template would
    have produced for the whole conversation.

    May offer `markup`, the `miles.api.Markup` that its models write: a server can then pass an answer on while it is
    made. Without it, an answer is passed on when it is finished. And `tokenizer`, the transformers tokenizer that it
    renders with, which the generate function `agent` needs.
    """

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens at which generation ends."""

    @property
    def end_of_turn_id(self) -> int | None:
        """Of these, the token that the format itself writes after an assistant turn; None where it has none."""

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        """A conversation, ready for the assistant to speak."""

    def render_text(self, text: str) -> list[int]:
        """A prompt that is plain text, taken as it is."""

    def render_next(self, messages: Sequence[Message], closed: bool = True) -> list[int]:
        """Environment messages after an assistant turn, up to where the assistant speaks again.

        `closed` is False when the turn did not end with `end_of_turn_id`, which is then added first.
        """

    def parse(self, tokens: Sequence[int], finish_reason: str = "stop") -> Action:
        """What the assistant said: text, reasoning, tool calls. A malformed call is a call with an `error`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of these tokens without special tokens."""

    def render_conversation(
        self, messages: Sequence[Message], tools: Sequence[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        """A whole conversation for SFT: tokens and a mask of the same length, 1 on what the assistant said."""


@runtime_checkable
class ModelTransform(Protocol):
    """Changes a model after it is built and before it is sharded: LoRA, freezing, batch-invariant kernels."""

    def prepare(self, model: nn.Module, role: Role) -> nn.Module: ...

    def trainable(self, name: str) -> bool:
        """Whether the parameter of this name gets a gradient."""

    def synced(self, groups: Iterable[WeightGroup]) -> Iterator[WeightGroup]:
        """What is sent to the engines: everything, or an adapter alone."""


@runtime_checkable
class PrecisionScheme(Protocol):
    """Number formats of training and of the weights that engines receive."""

    logprob_tolerance: float
    """How far engine and trainer may differ per token under this scheme, for the probe after a weight sync."""

    def configure(self, backend: str, model_config: dict[str, Any]) -> None:
        """Before the model is built."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """After it is built, before it is sharded."""

    def autocast(self) -> AbstractContextManager:
        """Around every forward."""

    def export(self, groups: Iterable[WeightGroup]) -> Iterator[WeightGroup]:
        """On the way to an engine: quantised weights with their scales."""

    def engine_options(self) -> Mapping[str, Any]: ...


@runtime_checkable
class RoutingReplay(Protocol):
    """Makes the trainer use the expert choices of the rollout (R3) or of its own first pass (R2).

    Those of the rollout are `miles.api.expert_choices(batch.columns[ROUTED_EXPERTS])`, -1 where there are none.
    """

    def attach(self, model: nn.Module, model_config: Any) -> None: ...

    def recording(self) -> AbstractContextManager: ...

    def replaying(self, batch: MicroBatch) -> AbstractContextManager:
        """Within it, forward and recomputation choose the recorded experts; probabilities stay differentiable."""


# --------------------------------------------------------------------------------------------------------------- data


@runtime_checkable
class DataSource(Protocol):
    """Where prompts come from. Context: `DataContext`.

    May offer `counts`, a mapping of numbers (dropped prompts, skipped rows) that are reported as `data/...`.
    """

    def __len__(self) -> int:
        """Prompts in an epoch."""

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next `count`, rendered to tokens, going on into the next epoch when one ends."""

    def every_prompt(self) -> list[Prompt]:
        """Every usable prompt once, in the order of sets and rows, whatever was drawn before: for evaluation."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# ------------------------------------------------------------------------------------------------------------- rollout


@dataclass(frozen=True)
class EngineHealth:
    weight_version: int
    running: int
    waiting: int
    asleep: frozenset[EnginePart] = frozenset()
    process: str = ""
    """`miles.toolkit.this_process()` where its weights are; empty where that cannot be said."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Numbers since it was built (retries, time-outs), reported as `rollout/engine/...`."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates and scores tokens. Context: `EngineContext`. One object may stand for several servers.

    May offer `max_len`, the most tokens it takes in one sequence where that is less than the model's limit, and `async
    score_top(tokens, k, temperature) -> (ids [T, k] int64, log-probs [T, k] float32)`, the most likely tokens at each
    position given those before it (rows of position 0 are void), which distillation asks a teacher's server for; `async
    checksums() -> Mapping[str, str]`: what `miles.toolkit.checksums` says of the weights it holds, by their checkpoint
    names (after a weight sync it is compared with the trainer's); `async restart()`, after an `EngineLostError`: up
    again, all of it awake, its weights undefined until the next `receive`; and `stream(request) ->
    AsyncIterator[GenerateResult]`, which is `generate` in pieces: each holds the tokens since the one before, the last
    one says how it finished and has the routed experts. Closing it early aborts the request.
    """

    accepts: frozenset[str]
    """Weight-sync transports that its receiving half understands."""
    generates: bool
    """False for an engine that holds no model: prompts then come with their answers (SFT)."""

    async def start(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """An aborted request returns what it has.

        Raises:
            EngineLostError: the engine is gone; another may serve the request.
            EngineError: the request cannot be served.
        """

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """Log-probability of each given token, `[T]` float32, 0 at position 0.

        Raises:
            EngineError: the engine cannot score at this temperature.
        """

    async def abort(self, request_id: str | None = None) -> None:
        """One request, or all of them. On return they have ended, also those that were still on their way."""

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Stop between two forward passes. New requests wait; running ones are aborted, put back to the queue without
        their cache (`retract`), or frozen as they are (`in_place`: after a push they go on from the cache that the old
        weights filled, so that their later tokens come from neither policy alone)."""

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None:
        """Forget every cached prefix."""

    async def sleep(self, parts: frozenset[EnginePart]) -> None:
        """Give back the memory of these parts. The caller pauses first (`abort` or `retract`), or nothing runs."""

    async def wake(self, parts: frozenset[EnginePart]) -> None:
        """Weights that slept may be undefined until the next `receive`."""

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        """The receiving half of a weight sync. On return the engine serves `version`, its cache of older versions
        gone; on an error it serves the old weights or refuses requests, but never a mixture.

        While requests run, an engine swaps weights between two steps or refuses; to serve any engine, pause first. The
        payload is groups of weights, or a `miles.toolkit.Shipment`: `with opened(payload) as groups`. Drawing the next
        group tells the sender that the one before it has been copied.
        """

    async def health(self) -> EngineHealth: ...

    async def close(self) -> None: ...


@runtime_checkable
class Environment(Protocol):
    """A world that answers the model. One object per trajectory; what it raises or takes too long for makes the sample
    FAILED. May offer `state_dict`/`load_state_dict`, and a half-finished trajectory is then resumed, not restarted;
    `stop`, a tuple of strings at which the model's turns end, besides those of the task set: the closing tags of what
    it reads; `limits`, `miles.api.EnvironmentLimits` that hold where the task set says nothing; and `script(prompt)`:
    the actions (or their text) of somebody who knows what to do, as a list or a generator that is sent each StepResult.
    """

    async def reset(self, prompt: Prompt) -> Observation: ...

    async def step(self, action: Action) -> StepResult: ...

    async def close(self) -> None:
        """Called once, whatever happened before: a reset that failed or was cancelled, a step that still hangs."""


@runtime_checkable
class GenerateFunction(Protocol):
    """Turns a fresh (or resumed) sample into a finished one, or into siblings that share its `rollout_id`."""

    async def __call__(self, context: GenerateContext, sample: Sample) -> Sample | list[Sample]: ...


Score = float | Mapping[str, float]
"""A scalar, or named parts among which `reward` is the scalar."""


@runtime_checkable
class Reward(Protocol):
    """Judges finished samples. Offers `score`, or `score_group` when samples of a group are judged together.

    A malformed answer is worth a low score, not an exception. A plain function `(sample) -> Score` is fine too.
    """

    async def score(self, sample: Sample) -> Score: ...


@runtime_checkable
class GroupReward(Protocol):
    async def score_group(self, group: Group) -> Sequence[Score]: ...


@runtime_checkable
class SampleFilter(Protocol):
    """Decides whether a finished group is trained on; a dropped one is replaced."""

    def __call__(self, group: Group) -> Verdict: ...


# ------------------------------------------------------------------------------------------------------------- trainer


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Called once with the whole rollout batch. Pure: no state, no collective."""

    def __call__(self, inputs: AdvantageInputs) -> Tensor | Advantages: ...


@runtime_checkable
class ISCorrection(Protocol):
    """Weights and rejections from the log-ratio train / rollout. Called once with the whole rollout batch.

    Arguments are `[T]` float32 except `bounds` (see `AdvantageInputs`).
    """

    def __call__(
        self, train_log_probs_T: Tensor, rollout_log_probs_T: Tensor, mask_T: Tensor, bounds: Sequence[int]
    ) -> Correction: ...


@runtime_checkable
class PolicyLossFunction(Protocol):
    """Per-token loss of one micro-batch. Aggregation, mask and corrections stay in the core."""

    def __call__(self, inputs: LossInputs) -> PolicyLoss: ...


@runtime_checkable
class LossMask(Protocol):
    """Which tokens of one micro-batch the policy loss counts, decided from the new log-probs: a mask on any loss.

    Returns `[T]`, bool or 0 and 1: False where a token's loss becomes 0. It keeps its place in every denominator.
    Called without a graph; of several masks the product counts. KL and entropy terms are not masked.
    """

    def __call__(self, inputs: LossInputs) -> Tensor: ...


@runtime_checkable
class TrainBackend(Protocol):
    """One model in one rank in one role. Context: `BackendContext`.

    All ranks call the same method at the same time. The loss runs where the logits live: it receives selected
    log-probabilities (and entropy, values) that tensor parallelism has already reduced.

    May offer `shares_prompts`, True when it computes a prompt once that samples of a micro-batch begin with
    (`MicroBatch.shared`): the trainer then keeps such samples together.
    """

    data_rank: int
    """Which share of the batch this rank works on. Ranks that split a model share one: they are given the same batches,
    return the same outputs and sums (pipeline stages pass on those of the last), and count once."""
    data_size: int
    sums_gradients: bool
    """Gradients are summed over data ranks, not averaged: denominators handed to the loss are global."""

    def forward(self, batches: Sequence[MicroBatch], want: frozenset[Want]) -> list[Outputs]:
        """Without gradient, in evaluation mode; outputs on the CPU, but for `logits`, which stay where they are
        computed and may be asked for until the weights change."""

    def forward_backward(
        self, batches: Sequence[MicroBatch], loss: LossFunction, want: frozenset[Want] = frozenset({"log_probs"})
    ) -> dict[str, Tensor]:
        """Accumulate gradients of `loss` (plus the model's own auxiliary losses) over the batches; returns the sums
        over all batches of this rank. `want` says which outputs the loss is given. On OutOfMemory the accumulated
        gradients are worthless: call `zero_grad`.

        Like `forward` and `optim_step` it raises `torch.OutOfMemoryError`. A backend that lets the step be taken again
        with several ranks raises it on all of them alike, with the attributes `rank` (who ran out), `alone` (one sample
        was too much) and `tokens`; without these the worker passes the error on."""

    def optim_step(self) -> StepReport:
        """Clip, step, advance the schedule. A non-finite gradient skips the step on all ranks."""

    def zero_grad(self) -> None: ...

    def named_weights(self) -> Iterator[WeightGroup]:
        """Full tensors under checkpoint names, all ranks walking together. Only valid until the next item."""

    def take_weights(self, weights: Weights) -> None:
        """The inverse: those of a checkpoint of the same family. A critic's value head stays as it is."""

    def save(self, directory: Path) -> None:
        """Model, optimizer, schedule; each rank writes its own files."""

    def load(self, directory: Path, weights_only: bool = False) -> None:
        """Bit for bit. `weights_only` leaves the optimizer and the schedule as they are: another run's start."""

    def offload(self, parts: frozenset[TrainPart]) -> None: ...

    def onload(self, parts: frozenset[TrainPart]) -> None: ...


@runtime_checkable
class WeightSync(Protocol):
    """Moves weights from train workers to engines. Context: `SyncContext`.

    Lives in the driver; what must run in every train rank is a target string, called through the worker group as
    `workers.call("send_weights", target, ...)` or `call_each`: `target(weights, ...)`. What an engine is given is data
    too, a `miles.toolkit.Shipment`. A rank may have to walk its weights to the end for others to get on with theirs.
    """

    transport: str

    async def connect(self, workers: WorkerGroup, engines: Sequence[RolloutEngine]) -> None:
        """Once before the first push, and again after an engine was replaced."""

    async def push(self, version: int) -> Metrics:
        """On return every engine serves `version`. Raises WeightSyncError, or what a worker that failed raised
        (WorkerError), after which the run may start again."""


# -------------------------------------------------------------------------------------------------- around the loop


class EvaluationSite(Protocol):
    """Where an evaluator works: a live run, or an engine that was started for the evaluation alone."""

    config: Config

    def load_prompts(self, task_set: TaskSet) -> list[Prompt]:
        """Every usable prompt of a set, in file order."""

    def eval_task(self, task_set: TaskSet) -> Any:
        """The set's generate function and rewards on the live engines: a `miles.rollout.task.Task`."""


@runtime_checkable
class Evaluator(Protocol):
    """Measures the policy on held-out sets."""

    async def evaluate(self, run: EvaluationSite, step: int) -> dict[str, Metrics]:
        """Set name -> metrics."""


@runtime_checkable
class Tracker(Protocol):
    """Writes metrics somewhere. Must start or raise; a later failure is warned of once and the run goes on."""

    def start(self, run: RunInfo) -> None: ...

    def log(self, step: int, metrics: Metrics) -> None: ...

    def finish(self, status: str) -> None: ...
