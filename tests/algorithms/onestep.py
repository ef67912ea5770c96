"""One optimizer step on given log-probabilities: the trainer, its stages and the objective are the real ones, the model
is a table.

`_B` samples, `_S` places of a response, as other programs hold it: padded, mask 0 on what is not trained. `_T` tokens
of a micro-batch, as miles holds it: packed. `_V` vocabulary.
"""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from miles import testing
from miles.config import Config, Spec
from miles.config.derived import Derived
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.training.critic import ValueObjective
from miles.training.objective import Objective
from miles.training.packing import build_micro_batch
from miles.training.trainer import Trainer
from miles.training.worker import DataShare, StepOutcome
from miles.types import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    TEACHER_LOG_PROBS,
    AdvantageInputs,
    Advantages,
    Group,
    Outputs,
    Prompt,
    Sample,
    StepReport,
)

PROMPT = 2
"""Tokens before each response."""
VOCABULARY = 5


@dataclass
class Batch:
    """Log-probabilities of four policies, advantages and rewards."""

    lengths_B: list[int]
    mask_BS: Tensor
    new_BS: Tensor
    old_BS: Tensor
    rollout_BS: Tensor
    ref_BS: Tensor
    advantages_BS: Tensor
    rewards_B: Tensor
    group_B: list[int]
    values_BS: Tensor
    """A critic's, before the step; at its forward pass, `new_values_BS`."""
    new_values_BS: Tensor
    baseline_B: Tensor
    """Reward of a greedy answer to each sample's prompt."""

    def samples(self) -> list[Sample]:
        samples = []
        for i, (length, group) in enumerate(zip(self.lengths_B, self.group_B, strict=True)):
            prompt = Prompt(id=f"s:{group}", task_set="s", text="x", tokens=[7] * PROMPT)
            sample = Sample.begin(prompt, id=i, group_id=group)
            columns = {LOSS_MASK: self.mask_BS, ROLLOUT_LOG_PROBS: self.rollout_BS, TEACHER_LOG_PROBS: self.ref_BS}
            sample.append([3] * length, {column: values[i, :length].numpy() for column, values in columns.items()})
            sample.reward = float(self.rewards_B[i])
            samples.append(sample)
        return samples

    def row(self, values_BS: Tensor, i: int) -> Tensor:
        """One sample as miles holds it: its prompt's places first, 0 there, and no pad."""
        return torch.cat([torch.zeros(PROMPT), values_BS[i, : self.lengths_B[i]]])

    def packed(self, values_BS: Tensor) -> Tensor:
        """`[T]`: all samples end to end."""
        return torch.cat([self.row(values_BS, i) for i in range(len(self.lengths_B))])

    def padded(self, rows: Sequence) -> Tensor:
        """`[B, S]` of what miles holds of each sample."""
        padded_BS = torch.zeros_like(self.mask_BS)
        for i, row in enumerate(rows):
            padded_BS[i, : self.lengths_B[i]] = torch.as_tensor(row)[PROMPT:]
        return padded_BS

    def unpacked(self, values_T: Tensor) -> Tensor:
        """`[B, S]` of `packed`."""
        return self.padded(values_T.split([PROMPT + length for length in self.lengths_B]))

    def inputs(self, **fields) -> AdvantageInputs:
        """What an estimator is given."""
        return AdvantageInputs(
            rewards_N=self.rewards_B.double(),
            mask_T=self.packed(self.mask_BS),
            bounds=[0, *accumulate(PROMPT + length for length in self.lengths_B)],
            group_N=torch.tensor(self.group_B),
            rollout_N=torch.arange(len(self.group_B)),
            values_T=self.packed(self.values_BS),
            baseline_rewards_N=self.baseline_B.double(),
            **fields,
        )


@dataclass
class Step:
    """What one optimizer step is: its loss, the gradient with respect to each log-probability, and metrics."""

    loss: float
    gradient_BS: Tensor
    logits_gradient_BSV: Tensor
    """With respect to logits, for losses that look at them."""
    value_gradient_BS: Tensor
    """Of the critic's loss, with respect to its values."""
    advantages_BS: Tensor
    metrics: dict[str, float]

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Loss, norm of the gradient, its first entry."""
        return self.loss, float(self.gradient_BS.norm()), float(self.gradient_BS[0, 0])


def golden_batch() -> Batch:
    """`miles.testing.golden_batch()` as other programs take it, with the rewards, values and baselines it lacks."""
    packed = testing.golden_batch()
    lengths = [end - start for start, end in pairwise(packed.bounds)]

    def padded(values_T: Tensor) -> Tensor:
        return pad_sequence(values_T.split(lengths), batch_first=True)

    return Batch(
        lengths,
        padded(packed.mask_T),
        padded(packed.log_probs_T),
        padded(packed.old_log_probs_T),
        padded(packed.rollout_log_probs_T),
        padded(packed.ref_log_probs_T),
        padded(packed.advantages_T),
        rewards_B=torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0]),
        group_B=[0, 0, 0, 0, 1, 1, 1, 1],
        values_BS=padded(packed.mask_T) / 2,
        new_values_BS=padded(packed.mask_T) * 0.6,
        baseline_B=torch.tensor(4 * [0.25] + 4 * [0.75]),
    )


def random_batch(seed: int, spread: float = 0.3, gaps: bool = True, per_token: bool = False, count: int = 12) -> Batch:
    """Groups of four; lengths from 1 to 16; with `gaps`, tokens of an environment between those of the model, never
    the first. One log-ratio in ten is four times as large. `per_token`: an advantage for each token, not for each
    sample."""
    draw = torch.Generator().manual_seed(seed)
    places = 16
    lengths = torch.randint(1, places + 1, (count,), generator=draw).tolist()
    mask_BS = (torch.arange(places)[None] < torch.tensor(lengths)[:, None]).float()
    if gaps:
        mask_BS[:, 1:] *= (torch.rand(count, places - 1, generator=draw) > 0.3).float()

    def near(values_BS: Tensor) -> Tensor:
        scale_BS = torch.where(torch.rand(count, places, generator=draw) < 0.1, 4 * spread, spread)
        return (values_BS + scale_BS * torch.randn(count, places, generator=draw)).clamp(-30, -0.01)

    new_BS = near(torch.full((count, places), -1.5))
    old_BS = near(new_BS)
    advantages_BS = torch.randn(count, places if per_token else 1, generator=draw) * mask_BS
    rewards_B = torch.randint(0, 4, (count,), generator=draw) / 2.0
    groups = [i // 4 for i in range(count)]
    columns = (mask_BS, new_BS, old_BS, near(old_BS), near(new_BS), advantages_BS)
    values_BS = torch.rand(count, places, generator=draw)
    new_values_BS = values_BS + spread * torch.randn(count, places, generator=draw)
    baseline_B = torch.rand(count // 4 + 1, generator=draw)[torch.tensor(groups)]
    return Batch(lengths, *columns, rewards_B, groups, values_BS, new_values_BS, baseline_B)


@functools.cache
def plugins():
    return load_plugins()


class Ranks:
    """A worker group whose models, actor and critic, know nothing but the batch. Micro-batches are built and objectives
    are called as a train worker does it; `pad` tokens are laid after each, as a backend may."""

    def __init__(self, batch: Batch, config: Config, registry: Registry, size: int, pad: int):
        self.batch, self.size, self.pad = batch, size, pad
        loss = registry.build("policy_losses", config.algorithm.policy_loss)
        masks = [(spec.name, registry.build("loss_masks", spec)) for spec in config.algorithm.loss_masks]
        self.losses = {
            "actor": Objective(config.algorithm, loss, masks),
            "critic": ValueObjective(config.critic.value_clip),
        }
        self.now_BS = {
            "actor": batch.new_BS.clone().requires_grad_(),
            "critic": batch.new_values_BS.clone().requires_grad_(),
        }
        """What the models say at the step."""
        draw = torch.Generator().manual_seed(0)
        student_BSV, self.teacher_BSV = torch.randn(2, *batch.mask_BS.shape, VOCABULARY, generator=draw)
        self.now_BS["logits"] = student_BSV.requires_grad_()
        self.losses["actor"].teacher_logits = lambda micro: self._logits(self.teacher_BSV, micro.sample_ids)

    async def call_each(self, method: str, arguments: list) -> list:
        return [getattr(self, method)(*one) for one in arguments]

    def forward(self, model, tables, want):
        """What they said before it."""
        batch = self.batch
        values_BS = {"actor": batch.old_BS, "reference": batch.ref_BS, "critic": batch.values_BS}[model]
        return [{name: [batch.row(values_BS, i).numpy() for i in table.ids] for name in want} for table in tables]

    def train_step(self, model, tables, tokens) -> StepOutcome:
        objective, sums = self.losses[model], {}
        objective.tokens = tokens
        for table in tables:
            packed = build_micro_batch(range(len(table)), table.tokens, table.columns)
            columns = {name: pad(value, (0, self.pad)) for name, value in packed.columns.items()}
            micro = replace(packed, sample_ids=table.ids, columns=columns)
            result = objective(micro, self._outputs(model, table.ids))
            if result.loss.requires_grad:
                result.loss.backward()
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return StepOutcome(sums, StepReport(1.0, False, 1e-3), 0)

    def _outputs(self, model: str, ids: list[int]) -> Outputs:
        values_T = torch.cat([*(self.batch.row(self.now_BS[model], i) for i in ids), torch.full((self.pad,), -1.0)])
        if model == "critic":
            return Outputs(values_T=values_T)
        logits = self._logits(self.now_BS["logits"], ids)
        return Outputs(log_probs_T=values_T, entropy_T=-values_T.exp() * values_T, logits=logits)

    def _logits(self, logits_BSV: Tensor, ids: list[int]):
        rows = [pad(logits_BSV[i, : self.batch.lengths_B[i]], (0, 0, PROMPT, 0)) for i in ids]
        logits_TV = torch.cat([*rows, torch.zeros(self.pad, VOCABULARY)])
        return lambda start, end: logits_TV[start:end]

    def gradient(self, of: str) -> Tensor:
        now_BS = self.now_BS[of]
        return torch.zeros_like(now_BS) if now_BS.grad is None else now_BS.grad


def one_step(
    batch: Batch,
    *,
    ranks: int = 1,
    max_tokens: int = 1 << 20,
    pad: int = 0,
    order: list[int] | None = None,
    given: bool = True,
    **algorithm,
) -> Step:
    """The first optimizer step on this batch, old log-probs recomputed.

    Args:
        ranks: data-parallel shares.
        max_tokens: of a micro-batch.
        order: of the samples; as they stand when not given.
        given: take the batch's advantages; else those of the estimator that `algorithm` names.
        algorithm: settings of the section `algorithm`; of `critic`, as `critic=`.
    """
    registry = Registry(plugins())
    if given:
        registry.add("advantage_estimators", "given", lambda inputs: _given(batch, inputs))
        algorithm["advantage_estimator"] = "given"
    config = Config.model_validate(
        {
            "rollout": {"num_rollout": 1, "batch_size": 1, "n_samples_per_prompt": len(batch.lengths_B)},
            "critic": algorithm.pop("critic", {}),
            "algorithm": {"old_logprobs": "recompute", **algorithm},
            "train": {"max_tokens_per_gpu": max_tokens},
            "data": {"sets": [{"name": "s", "path": "x.jsonl"}]},
        }
    )
    workers = Ranks(batch, config, registry, ranks, pad)
    trainer = Trainer(config, Derived.of(config), registry, workers, [DataShare(i, False) for i in range(ranks)])
    samples = batch.samples()
    ordered = [samples[i] for i in order or range(len(samples))]
    groups = [Group(s.group_id, None, [s], baseline_reward=float(batch.baseline_B[s.id])) for s in ordered]
    metrics = asyncio.run(trainer.step(groups))
    advantages_BS = batch.padded([trainer.learned[i]["advantages"] for i in range(len(samples))])
    gradients = [workers.gradient(of) for of in ("actor", "logits", "critic")]
    return Step(metrics["train/loss"], *gradients, advantages_BS, metrics)


def advantages(batch: Batch, name: str, options: dict | None = None, **fields) -> tuple[Tensor, Tensor | None]:
    """Advantages and returns `[B, S]` that one estimator says, asked by itself. `fields` of its inputs besides."""
    said = Registry(plugins()).build("advantage_estimators", Spec(name=name, options=options or {}))(
        batch.inputs(**fields)
    )
    said = said if isinstance(said, Advantages) else Advantages(said)
    returns_BS = None if said.returns_T is None else batch.unpacked(said.returns_T)
    return batch.unpacked(said.advantages_T), returns_BS


def _given(batch: Batch, inputs: AdvantageInputs) -> Tensor:
    return torch.cat([batch.row(batch.advantages_BS, i) for i in inputs.rollout_N.tolist()])
