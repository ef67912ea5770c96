"""The trainer: from a rollout batch to an updated policy.

    log-probs (old, reference) -> KL, advantages, corrections -> optimizer steps

The driver decides and computes whatever needs the whole batch; ranks compute log-probabilities and gradients. Numbers
travel as columns of a `Table`, which is cut into micro-batches anew for each pass.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from miles.component import TEACHER_LOGITS
from miles.config import Config
from miles.config.base import NONE
from miles.config.components import component_needs
from miles.config.derived import Derived
from miles.errors import NonFiniteError
from miles.protocols import Want, WorkerGroup
from miles.registry import Registry
from miles.training.advantages import AdvantageStage
from miles.training.aggregation import token_weights
from miles.training.flops import ForwardCost
from miles.training.mismatch import mismatch_metrics, mismatch_terms, mismatch_weights
from miles.training.objective import weighted
from miles.training.packing import shared_prompts
from miles.training.schedule import optimizer_steps, rank_micro_batches
from miles.training.table import Table
from miles.training.teachers import Teachers
from miles.training.worker import DataShare, StepOutcome
from miles.types import ROLLOUT_LOG_PROBS, ROUTED_EXPERTS, TEACHER_LOG_PROBS, Group, Metrics


class Trainer:
    """Drives the train workers through one rollout batch after the other."""

    def __init__(
        self,
        config: Config,
        derived: Derived,
        registry: Registry,
        workers: WorkerGroup,
        shares: Sequence[DataShare],
        teachers: Teachers | None = None,
        forward_cost: ForwardCost | None = None,
        on_policy: bool = True,
    ):
        """`shares` of the ranks; `teachers` where a component needs one; `forward_cost` where it is known; `on_policy`:
        all samples of a batch are drawn by the very weights that are trained on them."""
        self.config, self.derived, self.workers = config, derived, workers
        self.shares = [share.part for share in shares]
        self.together = all(share.together for share in shares)
        self.forward_cost, self.on_policy = forward_cost, on_policy
        self.stage = AdvantageStage(config, registry)
        self.needs = component_needs(config, registry)
        self.teachers = teachers
        self.batches = 0
        """Trained on so far."""
        self.skipped_in_a_row = Counter[str]()
        """By what was skipped: batches, or the optimizer steps of a model."""
        self.seconds = 0.0
        """Time in which the workers worked on the last batch."""
        self.learned: dict[int, dict[str, Any]] = {}
        """Of the last batch, for people: sample id -> `advantages` `[T]` and `loss`, as far as training came."""

    async def step(self, groups: Sequence[Group]) -> Metrics:
        """Train on a batch; returns its metrics.

        Raises:
            NonFiniteError: too many optimizer steps in a row were skipped.
            OutOfMemoryError: a sample alone does not fit.
        """
        table = Table.from_groups(groups, self.config.algorithm.truncated)
        self.learned = {i: {} for i in table.ids}
        empty = not any(mask.any() for mask in table.columns["mask"])
        self._watch_skips("batches", empty, "had no trainable token: see the statuses in rollouts/")
        if empty:
            return {"train/skipped_batches": 1.0}
        metrics: Metrics = {}
        self.seconds = 0.0
        unsaid = self.needs & TEACHER_LOGITS or not table.complete(TEACHER_LOG_PROBS.name)
        if unsaid and self.teachers is None and "teacher" in self.needs:
            table.require(TEACHER_LOG_PROBS.name, "learning from a teacher, without one (--opd-teacher-load),")
        elif unsaid and self.teachers is not None:
            samples = {sample.id: sample for group in groups for sample in group.samples}
            await self.teachers.teach(table, samples, self._forward)
        await self._log_probs(table, metrics)
        if "critic" in self.needs:
            table.columns["values"] = await self._forward("critic", table, "values")
        metrics.update(self.stage(table))
        for i, advantages_T in zip(table.ids, table.columns.get("advantages", ()), strict=False):
            self.learned[i]["advantages"] = advantages_T
        for model in self._learners():
            metrics.update(await self._optimize(model, table))
        self.batches += 1
        return metrics | {"perf/workers_time": self.seconds}

    def _learners(self) -> list[str]:
        """Which models learn from this batch. A critic may have some for itself at first."""
        if "critic" not in self.needs:
            return ["actor"]
        return ["critic"] if self.batches < self.config.critic.only_steps else ["critic", "actor"]

    # --------------------------------------------------------------------------------------------------- log-probs

    async def _log_probs(self, table: Table, metrics: Metrics) -> None:
        """Attach `old_log_probs` (unless the first optimizer step gives them for free) and `ref_log_probs`."""
        if self._old == "rollout":
            table.require(ROLLOUT_LOG_PROBS.name, "algorithm.old_logprobs: rollout")
            table.columns["old_log_probs"] = table.columns["rollout_log_probs"]
        elif self._old == "recompute":
            table.columns["old_log_probs"] = await self._forward("actor", table)
            metrics.update(self._measured_mismatch(table))
        if "reference" in self.needs:
            table.columns["ref_log_probs"] = await self._forward("reference", table)

    @property
    def _old(self) -> Literal["rollout", "recompute", "now"]:
        """Where old log-probs come from. `now`: the first and only forward pass of this batch is the old policy, which
        was it that acted. Where it was not, ratios are to the one that did, unless a correction sees to that."""
        if self.config.algorithm.old_logprobs != "auto":
            return self.config.algorithm.old_logprobs
        corrected = self.config.algorithm.is_correction.name != NONE
        if self.stage.has_advantages and not self.on_policy:
            return "recompute" if corrected else "rollout"
        several = self.derived.optimizer_steps_per_rollout > 1
        needed = self.stage.needs_old_log_probs or (several and self.stage.has_advantages)
        return "recompute" if needed else "now"

    async def _forward(self, model: str, table: Table, want: Want = "log_probs") -> list[np.ndarray]:
        """What a model says of every row."""
        table = self._told(model, table)
        plan = self._plan(table, self.derived.log_probs_max_tokens)
        calls = [(model, [table.take(rows) for rows in batches], (want,)) for batches in plan]
        found: dict[int, np.ndarray] = {}
        for batches, outputs in zip(plan, await self._on_shares("forward", calls), strict=True):
            for rows, output in zip(batches, outputs, strict=True):
                found.update(zip(rows, output[want], strict=True))
        return [found[row] for row in range(len(table))]

    def _measured_mismatch(self, table: Table) -> Metrics:
        weights_T = mismatch_weights(table)
        if weights_T is None:
            return {}
        terms = mismatch_terms(table.flat("old_log_probs"), table.flat("rollout_log_probs"))
        return mismatch_metrics({name: float(weighted(v_T, weights_T)) for name, v_T in terms.items()})

    # -------------------------------------------------------------------------------------------------- optimization

    async def _optimize(self, model: str, table: Table) -> Metrics:
        """All optimizer steps of one model on this batch. Metrics of the policy's begin with `train/`, a critic's with
        `critic/`."""
        train, prefix = self.config.train, "train" if model == "actor" else model
        steps = self.derived.optimizer_steps_per_rollout // train.num_epochs_per_rollout
        totals: dict[str, list[float]] = defaultdict(list)
        skipped = retries = 0
        for index, rows in enumerate(optimizer_steps(table.rollout_N.tolist(), steps, train.num_epochs_per_rollout)):
            part = self._told(model, table).take(rows)
            outcomes = await self._optimizer_step(model, part, measure=index == 0 and model == "actor")
            report = outcomes[0].report
            for outcome in outcomes:
                for i, loss in outcome.losses.items():
                    self.learned[i].setdefault("loss", loss)
            retries += max(outcome.out_of_memory for outcome in outcomes)
            skipped += report.skipped
            whose = f"optimizer steps of the {model}"
            self._watch_skips(whose, report.skipped, "had a non-finite loss or gradient and were skipped")
            if not report.skipped:
                totals[f"{prefix}/grad_norm"].append(report.grad_norm)
                for name in dict.fromkeys(name for outcome in outcomes for name in outcome.sums):
                    totals[name].append(sum(outcome.sums.get(name, 0.0) for outcome in outcomes))
        metrics = {name: float(np.mean(values)) for name, values in totals.items()}
        mismatch = {k.removeprefix("mismatch/"): metrics.pop(k) for k in list(metrics) if k.startswith("mismatch/")}
        if mismatch:
            metrics.update(mismatch_metrics(mismatch))
        return metrics | {
            f"{prefix}/lr": report.learning_rate,
            f"{prefix}/skipped_steps": float(skipped),
            f"{prefix}/oom_retries": float(retries),
        }

    async def _optimizer_step(self, model: str, table: Table, measure: bool) -> list[StepOutcome]:
        """One optimizer step. `measure`: nothing was updated since the rollout, so that the mismatch shows."""
        algorithm = self.config.algorithm
        longest = float(max(task.sampling.max_new_tokens for task in self.config.data.sets))
        constant = algorithm.aggregation_constant or longest
        mask_T = table.flat("mask")
        weights_T = token_weights(mask_T, table.bounds, table.rollout_N, algorithm.loss_aggregation, constant)
        table.put("weights", weights_T)
        if measure and self._old != "recompute" and (measured_T := mismatch_weights(table)) is not None:
            table.put("mismatch_weights", measured_T)
        tokens = max(float(mask_T.sum()), 1.0)
        plan = self._plan(table, self.config.train.max_tokens_per_gpu)
        return await self._on_shares("train_step", [(model, [table.take(rows) for rows in b], tokens) for b in plan])

    @staticmethod
    def _told(model: str, table: Table) -> Table:
        """What of a batch goes to a model's ranks: the policy's experts are no other model's, and many bytes."""
        return table if model == "actor" else table.without(ROUTED_EXPERTS)

    async def _on_shares(self, method: str, calls: Sequence[tuple]) -> list[Any]:
        """One call a share, made on every rank that works on it; one answer a share."""
        started = time.perf_counter()
        answers = await self.workers.call_each(method, [calls[share] for share in self.shares])
        self.seconds += time.perf_counter() - started
        return [answers[self.shares.index(share)] for share in range(len(calls))]

    def _plan(self, table: Table, max_tokens: int) -> list[list[list[int]]]:
        """`[share][micro-batch][row]`."""
        train = self.config.train
        cap = max_tokens * train.context_parallel_size if train.use_dynamic_batch_size else None
        shared: Sequence[int] = ()
        if self.together:
            shared = shared_prompts(np.concatenate(table.tokens), table.flat("mask").numpy(), table.bounds)
        costs: Sequence[float] | None = None if train.balance == "none" else table.lengths
        if train.balance == "flops" and self.forward_cost is not None:
            costs = self.forward_cost(table.lengths)
        size = len(set(self.shares))
        shares = train.reproducible_ranks
        return rank_micro_batches(
            table.lengths, size, cap, train.micro_batch_size, shared, costs=costs, planned_for=shares
        )

    def _watch_skips(self, what: str, skipped: bool, why: str) -> None:
        limit = self.config.train.max_nonfinite_steps
        count = self.skipped_in_a_row[what] = self.skipped_in_a_row[what] + 1 if skipped else 0
        if count > limit:
            raise NonFiniteError(
                f"{count} {what} in a row {why} (train.max_nonfinite_steps is {limit}). Look at the "
                "rewards, lengths and advantages in rollouts/, lower --lr, and resume from the last checkpoint."
            )

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_in_a_row": dict(self.skipped_in_a_row), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_in_a_row, self.batches = Counter(state["skipped_in_a_row"]), state["batches"]
