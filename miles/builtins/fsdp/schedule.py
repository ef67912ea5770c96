"""The learning rate as a function of how many optimizer steps were taken."""

from __future__ import annotations

import math

from miles.toolkit import OptimizerSection


def learning_rate(step: int, section: OptimizerSection, total_steps: int) -> float:
    """Rate of optimizer step `step` (the first is 0).

    Linear warm-up reaches `lr` at the end of `lr_warmup_steps`; then the rate stays (`constant`), or falls in a
    straight line or half a cosine to `min_lr`, reached after `lr_decay_steps` (the whole run when not given) and kept.
    """
    if step < section.lr_warmup_steps:
        return section.lr * (step + 1) / section.lr_warmup_steps
    if section.lr_schedule == "constant":
        return section.lr
    end = section.lr_decay_steps if section.lr_decay_steps is not None else total_steps
    progress = min((step - section.lr_warmup_steps) / max(end - section.lr_warmup_steps, 1), 1.0)
    left = 1.0 - progress if section.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_lr + (section.lr - section.min_lr) * left
