"""`algorithm`: advantages, losses, corrections, and how tokens are averaged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.base import ComponentSpec, ComponentSpecs, Flag, Section, Spec


class AlgorithmSection(Section):
    preset: Annotated[str | None, Flag("--preset")] = None
    """A recipe shipped by a plugin; `miles config` shows what it set."""
    advantage_estimator: Annotated[ComponentSpec, Flag("--advantage-estimator")] = Spec(name="grpo")
    """From rewards to per-token advantages."""
    advantage_terms: Annotated[ComponentSpecs, Flag("--advantage-terms")] = ()
    """Terms added to the advantages, such as distillation."""
    normalize_advantages: Annotated[bool, Flag("--normalize-advantages")] = False
    """Whiten advantages over all trainable tokens of the rollout batch."""
    policy_loss: Annotated[ComponentSpec, Flag("--policy-loss")] = Spec(name="ppo_clip")
    """Per-token loss."""
    loss_masks: Annotated[ComponentSpecs, Flag("--loss-masks")] = ()
    """Which tokens the policy loss leaves out, decided from the new log-probs; all masks together."""
    is_correction: Annotated[ComponentSpec, Flag("--is-correction")] = Spec(name="none")
    """Correction of the mismatch between rollout and trainer."""
    old_logprobs: Annotated[Literal["auto", "recompute", "rollout"], Flag("--old-logprobs")] = "auto"
    """What the ratio is taken to: the trainer's own log-probs before the update (`recompute`), the engine's
    (`rollout`), or `auto`: the trainer's, free of charge when one optimizer step follows each rollout."""
    kl_coef: Annotated[float, Flag("--kl-coef"), Field(ge=0)] = 0.0
    """Weight of the KL penalty in the reward."""
    kl_loss_coef: Annotated[float, Flag("--kl-loss-coef"), Field(ge=0)] = 0.0
    """Weight of the KL penalty in the loss."""
    kl_type: Annotated[Literal["k1", "k2", "k3", "low_var_kl"], Flag("--kl-loss-type")] = "k1"
    """Estimator of the KL."""
    unbiased_kl: Annotated[bool, Flag("--use-unbiased-kl")] = False
    """Multiply the KL of the loss by the ratio new / old."""
    entropy_coef: Annotated[float, Flag("--entropy-coef")] = 0.0
    """Weight of the entropy bonus."""
    loss_aggregation: Annotated[
        Literal["sample_mean", "token_mean", "constant", "sequence_sum"], Flag("--loss-aggregation")
    ] = "sample_mean"
    """From per-token losses to one number, over the global batch."""
    aggregation_constant: Annotated[float | None, Flag("--loss-aggregation-constant"), Field(gt=0)] = None
    """Tokens a sample counts for under `constant`; the longest response when not given."""
    truncated: Annotated[Literal["keep", "mask", "drop"], Flag("--truncated-samples")] = "keep"
    """Truncated samples: trained as they are, kept for the baseline with loss 0, or dropped."""
