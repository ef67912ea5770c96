"""`optimizer`: AdamW and its schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.base import Flag, Section


class OptimizerSection(Section):
    lr: Annotated[float, Flag("--lr"), Field(ge=0)] = 1e-6
    """Peak learning rate."""
    beta1: Annotated[float, Flag("--adam-beta1"), Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Flag("--adam-beta2"), Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Flag("--adam-eps"), Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Flag("--weight-decay"), Field(ge=0)] = 0.0
    """Decoupled, on matrices only."""
    clip_grad: Annotated[float, Flag("--clip-grad"), Field(ge=0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    lr_schedule: Annotated[Literal["constant", "linear", "cosine"], Flag("--lr-decay-style")] = "constant"
    """Shape after the warm-up."""
    lr_warmup_steps: Annotated[int, Flag("--lr-warmup-iters"), Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    lr_decay_steps: Annotated[int | None, Flag("--lr-decay-iters")] = None
    """Optimizer steps until `min_lr`; the whole run when not given."""
    min_lr: Annotated[float, Flag("--min-lr"), Field(ge=0)] = 0.0
    """Where the schedule ends."""
