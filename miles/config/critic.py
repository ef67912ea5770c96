"""`critic`: the value model that estimators such as `gae` need, and how it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.base import Flag, Section
from miles.config.optimizer import OptimizerSection


class CriticSection(Section):
    load: Annotated[str | None, Flag("--critic-load")] = None
    """Checkpoint (folder or hub name) it starts from, its value head too where there is one (`score.weight`, as
    sequence classifiers have); the policy's own start, with a fresh head, when not given."""
    lr: Annotated[float | None, Flag("--critic-lr"), Field(ge=0)] = None
    """Peak learning rate; the policy's when not given. Betas, weight decay and clipping are the policy's."""
    lr_schedule: Annotated[Literal["constant", "linear", "cosine"], Flag("--critic-lr-decay-style")] = "constant"
    """Shape after the warm-up."""
    lr_warmup_steps: Annotated[int, Flag("--critic-lr-warmup-iters"), Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    min_lr: Annotated[float, Flag("--critic-min-lr"), Field(ge=0)] = 0.0
    """Where the schedule ends, with the run."""
    only_steps: Annotated[int, Flag("--num-critic-only-steps"), Field(ge=0)] = 0
    """Rollout batches at the start from which the critic alone learns."""
    value_clip: Annotated[float | None, Flag("--value-clip"), Field(gt=0)] = 0.2
    """How far a value may move from what it was before the update and still pay off; null does not clip."""

    def optimizer(self, policy: OptimizerSection) -> OptimizerSection:
        """The critic's optimizer: the policy's, with a learning rate and a schedule of its own."""
        own = {
            "lr": policy.lr if self.lr is None else self.lr,
            "lr_schedule": self.lr_schedule,
            "lr_warmup_steps": self.lr_warmup_steps,
            "lr_decay_steps": None,
            "min_lr": self.min_lr,
        }
        return policy.model_copy(update=own)
