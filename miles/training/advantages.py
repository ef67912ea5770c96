"""Advantages and corrections of a whole rollout batch: pure functions, called once, before the optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.config import NONE, Config, Spec
from miles.config.components import component_needs
from miles.errors import TrainError
from miles.registry import Registry
from miles.targets import defined_at, described
from miles.training.aggregation import sum_per_sample
from miles.training.critic import explained_variance
from miles.training.kl import kl_estimate
from miles.training.statistics import whiten
from miles.training.table import Table
from miles.types import ROLLOUT_LOG_PROBS, AdvantageInputs, Advantages, Correction, Metrics


class AdvantageStage:
    """Builds the configured estimator, advantage terms and correction once, and applies them to each batch."""

    def __init__(self, config: Config, registry: Registry):
        self.algorithm = algorithm = config.algorithm
        kind, estimator, correction = "advantage_estimators", algorithm.advantage_estimator, algorithm.is_correction
        self.has_advantages = estimator.name != NONE
        self.estimator_takes_kl = self.has_advantages and "kl" in registry.component(kind, estimator.name).needs
        teacher = "teacher" in component_needs(config, registry)
        self.needs_old_log_probs = correction.name != NONE or algorithm.kl_coef > 0 or teacher
        named = [estimator, *algorithm.advantage_terms] if self.has_advantages else []
        self.estimators = [(spec, registry.build(kind, spec)) for spec in named]
        """The estimator, and the terms that are added to what it says."""
        self.correction = registry.build("is_corrections", correction) if correction.name != NONE else None

    def __call__(self, table: Table) -> Metrics:
        """Attach `advantages` (and `returns`, `is_weights`, `keep`) to the table."""
        metrics: Metrics = {}
        if self.has_advantages:
            _check_rewards(table)
            inputs = self._inputs(table)
            result, *terms = [estimated(spec, function, inputs) for spec, function in self.estimators]
            advantages_T = sum((term.advantages_T for term in terms), result.advantages_T)
            if self.algorithm.normalize_advantages:
                advantages_T = whiten(advantages_T, inputs.mask_T)
            advantages_T = torch.where(inputs.mask_T > 0, advantages_T.float(), 0.0)
            table.put("advantages", advantages_T)
            metrics.update(self._returns(table, inputs, result))
            for said in (result, *terms):
                metrics.update(said.metrics)
            metrics["train/advantage_abs"] = float(advantages_T.abs().sum() / inputs.mask_T.sum().clamp(min=1))
        if self.correction is not None:
            metrics.update(self._correct(table))
        return metrics

    def _returns(self, table: Table, inputs: AdvantageInputs, result: Advantages) -> Metrics:
        """Attach what a critic shall learn, and say how much of it it knew."""
        if inputs.values_T is None:
            return {}
        if result.returns_T is None:
            raise TrainError(
                f"advantage estimator {self.algorithm.advantage_estimator.name!r} needs a critic and returned no "
                "returns: return Advantages(advantages_T, returns_T)"
            )
        table.put("returns", torch.where(inputs.mask_T > 0, result.returns_T.float(), 0.0))
        known = explained_variance(inputs.values_T, result.returns_T, inputs.mask_T)
        return {"critic/explained_variance": known}

    def _inputs(self, table: Table) -> AdvantageInputs:
        def column(name: str) -> Tensor | None:
            return table.flat(name) if table.has(name) else None

        inputs = AdvantageInputs(
            rewards_N=table.rewards_N,
            mask_T=table.flat("mask"),
            bounds=table.bounds,
            group_N=table.group_N,
            rollout_N=table.rollout_N,
            old_log_probs_T=column("old_log_probs"),
            ref_log_probs_T=column("ref_log_probs"),
            rollout_log_probs_T=column("rollout_log_probs"),
            teacher_log_probs_T=column("teacher_log_probs"),
            values_T=column("values"),
            kl_coef=self.algorithm.kl_coef,
            baseline_rewards_N=table.baseline_rewards_N,
        )
        if self.algorithm.kl_coef and inputs.old_log_probs_T is not None and inputs.ref_log_probs_T is not None:
            inputs.kl_T = kl_estimate(inputs.old_log_probs_T, inputs.ref_log_probs_T, self.algorithm.kl_type)
            if not self.estimator_takes_kl:
                inputs.rewards_N = penalised(inputs)
        return inputs

    def _correct(self, table: Table) -> Metrics:
        table.require(ROLLOUT_LOG_PROBS.name, f"algorithm.is_correction: {self.algorithm.is_correction.name}")
        assert self.correction is not None
        mask_T = table.flat("mask")
        correction: Correction = self.correction(
            table.flat("old_log_probs"), table.flat("rollout_log_probs"), mask_T, table.bounds
        )
        who = f"IS correction {self.algorithm.is_correction.name!r}{defined_at(self.correction)}"
        if not isinstance(correction, Correction):
            came = type(correction).__name__
            raise TrainError(
                f"{who} returned {came}; a miles.api.Correction is expected, such as Correction(weights_T)"
            )
        for column, values_T in (("is_weights", correction.weights_T), ("keep", correction.keep_T)):
            if values_T is not None:
                values_T = values_T.float() if isinstance(values_T, Tensor) else values_T
                _require_one_a_token(who, values_T, mask_T)
                table.put(column, torch.where(mask_T > 0, values_T, 0.0))
        return correction.metrics


def _check_rewards(table: Table) -> None:
    bad = [i for i, finite in zip(table.ids, torch.isfinite(table.rewards_N).tolist(), strict=True) if not finite]
    if bad:
        raise TrainError(f"{len(bad)} rewards are not finite, the first that of sample {bad[0]}: look at the reward")
    paid: dict[int, float] = {}
    for i, rollout, reward in zip(table.ids, table.rollout_N.tolist(), table.rewards_N.tolist(), strict=True):
        if paid.setdefault(rollout, reward) != reward:
            raise TrainError(
                f"samples cut from one trajectory share its reward, and of rollout {rollout} one has {paid[rollout]:g} "
                f"and sample {i} {reward:g}: a reward with `score_group` can look at all of them and pay them alike"
            )


def penalised(inputs: AdvantageInputs) -> Tensor:
    """`[N]`: rewards minus `kl_coef` times the KL of the whole trajectory, over all siblings that were cut from it.

    For estimators that know only rewards. One that puts the KL on tokens itself declares the need `kl`.
    """
    assert inputs.kl_T is not None
    kl_N = sum_per_sample(inputs.kl_T.double() * inputs.mask_T, inputs.bounds)
    row_N = torch.unique(inputs.rollout_N, return_inverse=True)[1]
    kl_R = kl_N.new_zeros(int(row_N.max()) + 1).index_add(0, row_N, kl_N)
    return inputs.rewards_N - inputs.kl_coef * kl_R[row_N]


def estimated(spec: Spec, estimator: Any, inputs: AdvantageInputs) -> Advantages:
    """What an estimator says of a batch.

    Raises:
        TrainError: it raised, or what it returned is not one finite number a token. Names it and its place.
    """
    who = f"advantage estimator {spec.name!r}{defined_at(estimator)}"
    try:
        found = estimator(inputs)
    except Exception as error:
        raise TrainError(f"{who} raised {described(error)}") from error
    result = found if isinstance(found, Advantages) else Advantages(found)
    _require_one_a_token(who, result.advantages_T, inputs.mask_T)
    if result.returns_T is not None:
        _require_one_a_token(f"{who}, as returns,", result.returns_T, inputs.mask_T)
    return result


def _require_one_a_token(who: str, values_T: Any, mask_T: Tensor) -> None:
    """Raises TrainError: it is not one finite number a token."""
    if not isinstance(values_T, Tensor):
        came = f"{values_T!r:.60} ({type(values_T).__name__})"
    elif values_T.shape != mask_T.shape or not values_T.is_floating_point():
        came = f"{values_T.dtype} of shape {tuple(values_T.shape)}"
    elif not values_T.float()[mask_T > 0].isfinite().all():
        came = "values that are not finite on trainable tokens"
    else:
        return
    shape = tuple(mask_T.shape)
    raise TrainError(f"{who} returned {came}; a floating-point tensor of shape {shape}, one value a token, is expected")
