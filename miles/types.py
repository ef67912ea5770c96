"""The data that flows through miles, in the order it flows.

    Prompt -> Sample (one trajectory, one token stream) -> Group (the samples of one prompt)
           -> MicroBatch (packed samples on one rank) -> AdvantageInputs, LossInputs -> what components return

Everything per token is aligned with the token itself: entry `t` of any column speaks of `tokens[t]`, prompt tokens
included. So log-probabilities have a 0 at position 0 (nothing predicts the first token), the loss mask is 0 on the
prompt, and no code anywhere needs to know where the response starts. The one exception declares itself: a column with
`offset=-1` has one row fewer than there are tokens, its row `t` belonging to the forward pass at position `t` (the
one that predicts `tokens[t + 1]`); expert routing is such a column.

Names of tensors carry their dimensions: `_P` prompts, `_G` samples of a group, `_N` samples of a batch, `_T` tokens
(of all samples of the batch, end to end), `_V` vocabulary, `_L` layers, `_K` experts chosen per token.
This module imports no torch: tensors appear only in annotations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, TypedDict

import numpy as np

from miles.batches import AdvantageInputs as AdvantageInputs
from miles.batches import Advantages as Advantages
from miles.batches import Correction as Correction
from miles.batches import LossInputs as LossInputs
from miles.batches import LossResult as LossResult
from miles.batches import Metrics as Metrics
from miles.batches import MicroBatch as MicroBatch
from miles.batches import Outputs as Outputs
from miles.batches import PolicyLoss as PolicyLoss
from miles.batches import StepReport as StepReport
from miles.batches import WeightGroup as WeightGroup

# ---------------------------------------------------------------------------------------------- prompts and sampling


class Message(TypedDict, total=False):
    """One message of a conversation, as the OpenAI chat format and `apply_chat_template` spell it."""

    role: str
    content: Any
    reasoning_content: str
    tool_calls: list[dict]
    tool_call_id: str
    name: str


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Log-probabilities are always those of the distribution that was sampled from."""

    temperature: float = 1.0
    """0 means greedy; log-probabilities are then those of the model at temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    min_p: float = 0.0
    max_new_tokens: int = 256
    """Of one turn. What all turns of a trajectory may take together is the context's affair."""
    min_new_tokens: int = 0
    """Of one turn: before, its stop tokens are not drawn."""
    stop: tuple[str, ...] = ()
    """Generation ends after the token that completes one of these strings; the string stays in the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after one of these; the token stays in the output and is trained on."""

    @property
    def truncates(self) -> bool:
        """True when the support is cut, so that the acting policy is not the model's own distribution."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass
class Prompt:
    """One task: what the model is asked, and what is needed to judge the answer."""

    id: str
    """Stable across epochs and runs: `set:row`."""
    task_set: str
    """Name of the `TaskSet` it came from."""
    text: str | None = None
    """Exactly one of `text` and `messages` is given."""
    messages: list[Message] | None = None
    tools: list[dict] | None = None
    """OpenAI tool schemas."""
    images: list[Any] | None = None
    """Raw images; what a processor makes of them travels in `Sample.multimodal`."""
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens: list[int] | None = None
    """Token ids of the rendered prompt. Rendered once, by the data source; never again."""


# ------------------------------------------------------------------------------------------------------------ samples


class Status(StrEnum):
    """What became of a sample."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    """Hit a length limit; has tokens, may be trained."""
    ABORTED = "aborted"
    """Stopped by us before its end; may be resumed or retried."""
    FAILED = "failed"
    """An error; carries it in `Sample.error`, is never trained."""


@dataclass(frozen=True)
class Column:
    """Declares one per-token quantity. `width` is the shape of a row: `()` for scalars."""

    name: str
    dtype: str
    fill: float | int
    """Value of rows that nobody wrote (prompt and environment tokens)."""
    offset: Literal[0, -1] = 0
    width: tuple[int, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)  # columns are keys in every append of every sample

    def rows(self, tokens: int) -> int:
        return max(tokens + self.offset, 0)

    def filled(self, rows: int) -> np.ndarray:
        return np.full((rows, *self.width), self.fill, self.dtype)


LOSS_MASK = Column("loss_mask", "int8", fill=0)
"""1 on tokens the model produced and shall learn from."""
ROLLOUT_LOG_PROBS = Column("rollout_log_probs", "float32", fill=0.0)
"""Log-probability under the policy that sampled the token."""
WEIGHT_VERSION = Column("weight_version", "int32", fill=-1)
"""Version of the weights that produced the token; -1 on tokens that no model of ours produced."""
TEACHER_LOG_PROBS = Column("teacher_log_probs", "float32", fill=0.0)


ROUTED_EXPERTS = "rollout_routed_experts"


def routed_experts_column(layers: int, top_k: int, experts: int) -> Column:
    """Expert choices, one row of `[layers, top_k]` per forward position (offset -1). The fill means not recorded: -1,
    or 255 where rows are uint8, which they are up to 255 experts (see `miles.experts`)."""
    small, dtype = experts <= 255, "int16" if experts <= 2**15 else "int32"
    return Column(ROUTED_EXPERTS, "uint8" if small else dtype, 255 if small else -1, -1, (layers, top_k))


@dataclass
class Turn:
    """One stretch of tokens that the model produced in one go: `tokens[start:end]`."""

    start: int
    end: int
    finish_reason: str
    """`stop`, `length` or `abort`."""
    seconds: float = 0.0
    """Wall time of the generation."""
    environment_seconds: float = 0.0
    """Wall time of the environment's step after it."""
    reward: float | None = None


@dataclass
class Sample:
    """One trajectory as one token stream: the prompt, then alternating model and environment tokens.

    Tokens and columns change only through `append` and `write`, so that their lengths agree by construction. A column
    exists in a sample from the first write of it on; rows before that hold its `fill`. Example:

        sample = Sample.begin(prompt, id=7, group_id=1)           # tokens = prompt.tokens, loss_mask all 0
        sample.append(result.tokens, {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: result.log_probs})
        sample.append(tool_tokens)                                # environment tokens: every column gets its fill
    """

    id: int
    """Unique in a run, never reused."""
    group_id: int
    prompt: Prompt
    tokens: list[int]
    prompt_length: int
    rollout_id: int = -1
    """Siblings cut from one trajectory share it and count once; defaults to `id`."""
    seed: int = 0
    """Seed of this sample's random draws, so that they do not depend on what else is in flight."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    specs: dict[str, Column] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.PENDING
    max_new_tokens: int | None = None
    """Most tokens that one turn may have by its task set; None before it was generated."""
    reward: float | None = None
    """The scalar that advantages are computed from."""
    reward_before_terms: float | None = None
    """What it was before `data.reward_terms` were added; None where none were."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """What the scalar was made of, for people to read."""
    text: str = ""
    """Decoded response, for rewards and people; never tokenised again."""
    messages: list[Message] = field(default_factory=list)
    """The conversation so far, for environments and people."""
    multimodal: dict[str, Any] = field(default_factory=dict)
    """Processor outputs (pixel values ...) that the engine and the trainer both need."""
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    _rooms: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What columns grow into, and how much of it they fill."""

    @classmethod
    def begin(cls, prompt: Prompt, *, id: int, group_id: int, seed: int = 0) -> Sample:
        """A fresh sample that holds only its prompt."""
        if prompt.tokens is None:
            raise ValueError(f"prompt {prompt.id} has not been rendered to tokens")
        sample = cls(id, group_id, prompt, list(prompt.tokens), len(prompt.tokens), rollout_id=id, seed=seed)
        sample.messages = list(prompt.messages or [])
        sample.declare(LOSS_MASK)
        return sample

    def declare(self, column: Column) -> None:
        """Create `column`, holding its fill so far. Declaring it twice is fine, differently is an error."""
        known = self.specs.setdefault(column.name, column)
        if known != column:
            raise ValueError(f"column {column.name!r} is declared as {known} and as {column}")
        if column.name not in self.columns:
            self.columns[column.name] = column.filled(column.rows(len(self.tokens)))

    def append(self, tokens: Sequence[int], values: Mapping[Column, Any] | None = None) -> None:
        """Add tokens and their rows; columns without values get their fill. A scalar value stands for every token.

        Args:
            tokens: token ids, `[n]`.
            values: column -> scalar or `[n, *width]`. For a column of offset -1 the rows are those of the forward
                passes that predicted these tokens.
        """
        start, given = len(self.tokens), values or {}
        for column in given:
            self.declare(column)
        self.tokens.extend(tokens)
        for name, column in self.specs.items():
            missing = column.rows(len(self.tokens)) - len(self.columns[name])
            at_once = column in given and missing == len(tokens)
            self._extend(name, self._rows(column, given[column], missing) if at_once else column.filled(missing))
            if column in given and not at_once:
                self.write(column, start + column.offset, given[column], count=len(tokens))

    def _extend(self, name: str, rows: np.ndarray) -> None:
        """Add rows to a column. It grows into room that is taken by halves of its length, so that all turns of a long
        trajectory together copy it a few times, and not each of them once."""
        held = self.columns[name]
        total = len(held) + len(rows)
        room, filled = self._rooms.get(name, (held, -1))
        if held.base is not room or filled != len(held) or total > len(room):
            room = np.empty((total + total // 2, *held.shape[1:]), held.dtype)
            room[: len(held)] = held
        room[len(held) : total] = rows
        self.columns[name], self._rooms[name] = room[:total], (room, total)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rooms": {}}  # a copy grows into room of its own

    def write(self, column: Column, start: int, values: Any, count: int | None = None) -> None:
        """Overwrite rows `start ...` of a column, declaring it if need be (expert routing of a prompt comes late)."""
        self.declare(column)
        rows, target = self._rows(column, values, count), self.columns[column.name]
        end, total = start + len(rows), len(target)
        if start < 0 or end > total:
            raise ValueError(f"column {column.name!r} of sample {self.id}: rows {start}:{end} do not fit into {total}")
        target[start:end] = rows

    def beginning(self, length: int) -> Sample:
        """A copy that holds the first `length` tokens, and the turns that lie within them: a sibling that goes on in
        another way. Whose tokens they are to learn from is for the caller to say, in its loss mask."""
        if not self.prompt_length <= length <= len(self.tokens):
            raise ValueError(f"sample {self.id}: {length} tokens are no beginning of {len(self.tokens)} with a prompt")
        return replace(
            self,
            tokens=self.tokens[:length],
            columns={name: rows[: self.specs[name].rows(length)].copy() for name, rows in self.columns.items()},
            specs=dict(self.specs),
            turns=[replace(turn) for turn in self.turns if turn.end <= length],
            messages=list(self.messages),
            metadata=dict(self.metadata),
            reward_parts=dict(self.reward_parts),
        )

    def _rows(self, column: Column, values: Any, count: int | None) -> np.ndarray:
        if count is not None and np.isscalar(values):
            return np.full((count, *column.width), values, column.dtype)
        rows = np.asarray(values, dtype=column.dtype)
        if rows.shape[1:] != column.width or (count is not None and len(rows) != count):
            expected = ("any" if count is None else count, *column.width)
            raise ValueError(f"column {column.name!r} of sample {self.id}: rows {rows.shape} do not fit {expected}")
        return rows

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def loss_mask(self) -> np.ndarray:
        return self.columns["loss_mask"]

    @property
    def trainable_tokens(self) -> int:
        return int(self.columns["loss_mask"].sum())

    @property
    def task_reward(self) -> float | None:
        """What the task itself paid: the reward without `data.reward_terms`. It says whether an answer is right."""
        unshaped = self.reward_before_terms
        return self.reward if unshaped is None or self.reward is None else unshaped


@dataclass
class Group:
    """The samples of one prompt, in the order of their ids."""

    id: int
    prompt: Prompt
    samples: list[Sample]
    baseline: Sample | None = None
    """One greedy rollout of the same prompt, when a component needs it (`greedy_rollout`). Never trained: its loss mask
    is 0."""
    baseline_reward: float | None = None
    """Reward of `baseline`."""

    @property
    def rollouts(self) -> list[Sample]:
        """All that was generated for the group: the baseline, if there is one, and the samples."""
        return self.samples if self.baseline is None else [self.baseline, *self.samples]

    @property
    def rewards_G(self) -> list[float]:
        return [float(s.reward) for s in self.samples if s.reward is not None]

    @property
    def task_rewards_G(self) -> list[float]:
        """The same without `data.reward_terms`."""
        return [float(s.task_reward) for s in self.samples if s.task_reward is not None]


# ----------------------------------------------------------------------------------------------- engine and environment


@dataclass
class GenerateRequest:
    """Continue `tokens`. Token ids in, token ids out."""

    id: str
    tokens: list[int]
    sampling: SamplingParams
    seed: int = 0
    """With the position of a token it decides its random draw: the same request gives the same output whatever else
    the engine is doing, up to ties closer than floating-point error, or to the bit (`EngineContext.exact`). (SGLang
    promises this only with deterministic inference, and ignores the seed without.)"""
    routed_experts: bool = False
    multimodal: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    """Higher goes first: evaluation before training rollouts, of these the older groups."""
    routed_experts_from: int = 0
    """First row of expert choices that is wanted: the caller has those before it, of the turns before."""


@dataclass
class GenerateResult:
    """What the model said. `n` new tokens."""

    tokens: list[int]
    log_probs: list[float]
    """`[n]`, of the distribution each token was sampled from."""
    finish_reason: Literal["stop", "length", "abort", ""]
    """Empty in a piece of a stream that goes on."""
    weight_versions: list[int]
    """`[n]`: the version that produced each token."""
    routed_experts: np.ndarray | None = None
    """`[rows, layers, top_k]`, compact (`miles.api.compact_experts`): one for each forward position from
    `request.routed_experts_from` (or an earlier one) to `len(request.tokens) + n - 2`, which predicted the last token.
    Rows of a cached prefix are those of the pass that filled the cache. None when not asked for, and where they were
    lost (SGLang: by an abort in the queue)."""
    cached_tokens: int = 0
    """How many tokens of the request came from the prefix cache."""
    interrupted: bool = False
    """Aborted to make way for new weights, and not for good: ask for the rest at once."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]
    id: str = ""
    error: str | None = None
    """Why the call could not be parsed; `arguments` then holds the raw text under `raw`."""


@dataclass(frozen=True)
class Action:
    """What the model did in one turn, as an environment sees it."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Observation:
    """The start of an episode: messages for the model and the tools it may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """An environment's answer to an action."""

    messages: tuple[Message, ...] = ()
    reward: float | None = None
    done: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    inline: bool = False
    """The messages are no turns of their own: their text stands, as it is, within the model's turn, which goes on after
    it. Where the model ended its turn itself, they are a turn all the same."""


@dataclass(frozen=True)
class Verdict:
    """A filter's decision on a group, with a reason that is counted in the metrics when it is dropped."""

    keep: bool
    reason: str = ""
