"""The data of training, in the order it flows: packed samples on a rank, what a model says of them, what the driver and
the components compute from that. Alignment and names are those of `miles.types`, from where everything here can be
imported too. No torch: tensors appear only in annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, float]


@dataclass
class MicroBatch:
    """Whole samples packed end to end on one rank. `T` tokens, `N` samples.

    `columns` holds what the trainer attached, each `[T]` and aligned with `tokens_T` (see the module's docstring).
    Sample `i` is `[bounds[i], bounds[i + 1])`; a trailing pad, when a backend adds one, lies beyond `bounds[N]`.
    """

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64; restarts at 0 with each sample."""
    bounds: list[int]
    """`N + 1` offsets, the first 0."""
    sample_ids: list[int]
    """Names of these samples: their ids, or rows of the table they were packed from."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Per sample, `[N]`."""
    multimodal: list[dict[str, Any]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    """For each sample the length of its prompt if the sample before it has the same one, else 0: a backend may compute
    what siblings begin with once. Empty where nobody looked."""

    def __len__(self) -> int:
        return len(self.bounds) - 1


@dataclass
class Outputs:
    """What a model says about one micro-batch, aligned with its tokens and 0 where a sample starts."""

    log_probs_T: Tensor | None = None
    """float32: log-probability of each token given those before it, at the rollout temperature."""
    entropy_T: Tensor | None = None
    """float32, of the distribution that predicts the token, over the full vocabulary."""
    values_T: Tensor | None = None
    """A critic's value of the state before the token."""
    logits: Callable[[int, int], Tensor] | None = None
    """`logits(start, end) -> [end - start, V]`, float32, divided by the rollout temperature, rows predicting
    `tokens[start:end]` (void for a sample's first token): for losses that need them, in chunks, so that nobody holds
    `[T, V]`. They carry a gradient: put the work on a chunk in `torch.utils.checkpoint`, or backward holds all."""
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    """A model's own losses (router balance, z-loss, MTP), already weighted, as scalars."""


@dataclass
class LossResult:
    """A scalar whose gradient is this micro-batch's share of the global loss, and sums to report."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars. Summed over micro-batches and ranks they are the metric: denominators are global already."""


@dataclass(frozen=True)
class StepReport:
    """The outcome of one optimizer step, the same on all ranks."""

    grad_norm: float
    """Before clipping, over all parameters of the model."""
    skipped: bool
    """True when the gradient was not finite and the parameters were left as they were."""
    learning_rate: float


@dataclass
class AdvantageInputs:
    """A whole rollout batch, on the CPU, as estimators and corrections see it. `N` samples, `T` tokens in all.

    Optional fields are None when nothing asked for them (a component says what it `needs`).
    """

    rewards_N: Tensor
    mask_T: Tensor
    """float32 of 0 and 1."""
    bounds: list[int]
    """Sample `i` is `[bounds[i], bounds[i + 1])`."""
    group_N: Tensor
    """int64: samples with equal numbers answer the same prompt."""
    rollout_N: Tensor
    """int64: samples with equal numbers were cut from one trajectory; they share one reward and count once."""
    old_log_probs_T: Tensor | None = None
    ref_log_probs_T: Tensor | None = None
    rollout_log_probs_T: Tensor | None = None
    teacher_log_probs_T: Tensor | None = None
    values_T: Tensor | None = None
    kl_T: Tensor | None = None
    """Per-token KL to the reference by the configured estimator, when `algorithm.kl_coef` is set."""
    kl_coef: float = 0.0
    baseline_rewards_N: Tensor | None = None
    """Reward of one greedy rollout of the same prompt, for a component that needs `greedy_rollout`."""


@dataclass
class Advantages:
    """What an estimator returns when it has more to say than a tensor."""

    advantages_T: Tensor
    returns_T: Tensor | None = None
    metrics: Metrics = field(default_factory=dict)


@dataclass
class LossInputs:
    """One micro-batch with all its columns as a loss sees it. `log_probs_T` and `entropy_T` carry a gradient."""

    log_probs_T: Tensor
    old_log_probs_T: Tensor
    advantages_T: Tensor
    mask_T: Tensor
    bounds: list[int]
    entropy_T: Tensor | None = None
    rollout_log_probs_T: Tensor | None = None
    ref_log_probs_T: Tensor | None = None
    teacher_log_probs_T: Tensor | None = None
    outputs: Outputs | None = None
    teacher_logits: Callable[[int, int], Tensor] | None = None
    """Of teachers in the trainer, aligned like `outputs.logits` and at the same temperature, without a gradient."""
    tokens_T: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class PolicyLoss:
    """Per-token loss before mask, correction and aggregation, and per-token metrics to average over the mask."""

    loss_T: Tensor
    metrics_T: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Correction:
    """Importance weights and a keep mask, per token, detached; metrics are means over the rollout batch."""

    weights_T: Tensor | None = None
    keep_T: Tensor | None = None
    """Rejected tokens keep their place in every denominator."""
    metrics: Metrics = field(default_factory=dict)


WeightGroup = Mapping[str, "Tensor"]
"""Tensors that must reach an engine together, under their Hugging Face checkpoint names."""
