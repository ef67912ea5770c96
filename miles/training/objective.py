"""The loss of one micro-batch: policy loss, masks, correction, KL and entropy, weighted and summed.

Runs inside the backend, where the logits live. Everything that needs the whole batch (advantages, importance weights,
the weight of each token in the average) was computed by the driver and arrives as columns of the micro-batch:

    mask, weights           always; `weights` already averages over the optimizer step (miles.training.aggregation)
    advantages              unless the loss is supervised
    old_log_probs           absent when the old policy is this very forward pass (then the ratio is exactly 1)
    rollout_log_probs, ref_log_probs, teacher_log_probs, is_weights, keep      when they exist
    mismatch_weights        where this pass measures the mismatch; they average over the tokens that can tell
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from miles.config.algorithm import AlgorithmSection
from miles.errors import TrainError
from miles.protocols import LossMask
from miles.targets import defined_at, described
from miles.training.aggregation import mean_per_sample
from miles.training.kl import kl_estimate
from miles.training.mismatch import mismatch_terms
from miles.types import LossInputs, LossResult, MicroBatch, Outputs, PolicyLoss


class Loss:
    """What the losses of policy and critic have in common: the step they are in, and what they leave for people."""

    def __init__(self) -> None:
        self.tokens = 1.0
        """Trainable tokens in the step, on all ranks: the denominator of per-token metrics."""
        self.losses: list[tuple[list[int], Tensor]] = []
        """Of each micro-batch since this was emptied: sample ids, and mean policy loss of their trainable tokens."""

    def token_mean(self, value_T: Tensor, mask_T: Tensor) -> Tensor:
        """This micro-batch's share of the mean over the step's trainable tokens."""
        return weighted(value_T.detach(), mask_T) / self.tokens


class Objective(Loss):
    """`LossFunction` for a policy: call it with a micro-batch and the model's outputs on it."""

    def __init__(
        self,
        algorithm: AlgorithmSection,
        policy_loss: Callable[[LossInputs], PolicyLoss],
        masks: Sequence[tuple[str, LossMask]] = (),
    ):
        super().__init__()
        self.algorithm = algorithm
        self.policy_loss = policy_loss
        self.masks = masks
        """With their names."""
        self.teacher_logits: Callable[[MicroBatch], Callable[[int, int], Tensor]] | None = None
        """Has the teachers read a micro-batch, where the policy loss compares with their logits."""

    def __call__(self, batch: MicroBatch, outputs: Outputs) -> LossResult:
        assert outputs.log_probs_T is not None
        columns, mask_T = batch.columns, batch.columns["mask"]
        weights_T = columns["weights"]
        new_T = outputs.log_probs_T
        old_T = columns.get("old_log_probs", new_T.detach())

        inputs = self._inputs(batch, outputs, old_T)
        policy = self.policy_loss(inputs)
        self._require_one_a_token(policy, mask_T)
        loss_T = policy.loss_T
        sums: dict[str, Tensor] = {}
        for name, mask in self.masks:
            keep_T = kept(name, mask, inputs)
            loss_T = torch.where(keep_T, loss_T, 0.0)
            label = name.rpartition("/")[2].rpartition(":")[2]
            sums[f"train/{label}_masked"] = self.token_mean((~keep_T).float(), mask_T)
        for factor in ("is_weights", "keep"):
            if factor in columns:
                loss_T = loss_T * columns[factor]
        loss = policy_term = weighted(loss_T, weights_T)
        self.losses.append((batch.sample_ids, mean_per_sample(loss_T.detach(), mask_T, batch.bounds)))

        sums["train/pg_loss"] = policy_term.detach()
        if self.algorithm.kl_loss_coef:
            kl = weighted(self._kl(new_T, old_T, columns["ref_log_probs"]), weights_T)
            loss = loss + self.algorithm.kl_loss_coef * kl
            sums["train/kl_loss"] = kl.detach()
        if outputs.entropy_T is not None:
            if self.algorithm.entropy_coef:
                loss = loss - self.algorithm.entropy_coef * weighted(outputs.entropy_T, weights_T)
            sums["train/entropy"] = self.token_mean(outputs.entropy_T, mask_T)
        sums["train/loss"] = loss.detach()
        for name, value_T in policy.metrics_T.items():
            sums[f"train/{name}"] = self.token_mean(value_T, mask_T)
        sums.update(self._mismatch(new_T, batch))
        return LossResult(loss, sums)

    def _require_one_a_token(self, policy: Any, mask_T: Tensor) -> None:
        """Raises TrainError: the policy loss did not return a `PolicyLoss` with one number a token. Names its place."""
        who = f"policy loss {self.algorithm.policy_loss.name!r}"
        if not isinstance(policy, PolicyLoss):
            wanted = f"{type(policy).__name__}; a miles.api.PolicyLoss is expected, such as PolicyLoss(loss_T)"
            raise TrainError(f"{who}{defined_at(self.policy_loss)} returned {wanted}")
        if (found := policy.loss_T.shape) != (shape := mask_T.shape):
            wanted = f"shape {tuple(shape)}, one value a token: the core masks and averages"
            raise TrainError(f"{who}{defined_at(self.policy_loss)} returned shape {tuple(found)} instead of {wanted}")

    def _inputs(self, batch: MicroBatch, outputs: Outputs, old_T: Tensor) -> LossInputs:
        columns = batch.columns
        assert outputs.log_probs_T is not None
        advantages_T = columns.get("advantages")
        return LossInputs(
            log_probs_T=outputs.log_probs_T,
            old_log_probs_T=old_T,
            advantages_T=torch.zeros_like(old_T) if advantages_T is None else advantages_T,
            mask_T=columns["mask"],
            bounds=batch.bounds,
            entropy_T=outputs.entropy_T,
            rollout_log_probs_T=columns.get("rollout_log_probs"),
            ref_log_probs_T=columns.get("ref_log_probs"),
            teacher_log_probs_T=columns.get("teacher_log_probs"),
            outputs=outputs,
            teacher_logits=self.teacher_logits(batch) if self.teacher_logits else None,
            tokens_T=batch.tokens_T,
            columns=columns,
        )

    def _kl(self, new_T: Tensor, old_T: Tensor, ref_T: Tensor) -> Tensor:
        kl_T = kl_estimate(new_T, ref_T, self.algorithm.kl_type)
        if self.algorithm.unbiased_kl:
            kl_T = kl_T * (new_T - old_T).clamp(-20, 20).exp()
        return kl_T

    def _mismatch(self, new_T: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        if "mismatch_weights" not in batch.columns:
            return {}
        terms = mismatch_terms(new_T.detach(), batch.columns["rollout_log_probs"])
        return {f"mismatch/{name}": weighted(v_T, batch.columns["mismatch_weights"]) for name, v_T in terms.items()}


def kept(name: str, mask: LossMask, inputs: LossInputs) -> Tensor:
    """`[T]` bool: which tokens a loss mask keeps.

    Raises:
        TrainError: it raised, or what it returned is not one yes or no a token. Names it and its place.
    """
    who = f"loss mask {name!r}{defined_at(mask)}"
    try:
        with torch.no_grad():
            keep_T = mask(inputs)
    except Exception as error:
        raise TrainError(f"{who} raised {described(error)}") from error
    shape = inputs.mask_T.shape
    if not isinstance(keep_T, Tensor):
        came = f"{keep_T!r:.60} ({type(keep_T).__name__})"
    elif keep_T.shape != shape:
        came = f"shape {tuple(keep_T.shape)}"
    elif keep_T.dtype == torch.bool:
        return keep_T
    elif ((keep_T != 0) & (keep_T != 1)).any():
        came = "values other than 0 and 1"
    else:
        return keep_T.bool()
    raise TrainError(f"{who} returned {came}; a mask of shape {tuple(shape)}, bool or 0 and 1, is expected")


def weighted(value_T: Tensor, weights_T: Tensor) -> Tensor:
    """Sum of weighted values; tokens of weight 0 contribute 0 even where the value is not finite."""
    return torch.where(weights_T != 0, value_T * weights_T, 0.0).sum()
