"""Every value that follows from others is computed here, once; the config itself is never changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from miles.config.schema import Config
from miles.errors import ConfigError

BATCH, STEPS = "train.global_batch_size", "train.num_steps_per_rollout"


class Misfit(ConfigError):
    """Numbers of a config that do not fit together."""

    def __init__(self, key: str, value: Any, problem: str, remedy: str):
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(f"{key}={value} {problem}; {remedy}")


@dataclass(frozen=True)
class Numbers:
    """Numbers that follow from a config alone."""

    samples_per_rollout: int | None
    """None where task sets draw different numbers of samples: it then depends on the prompts of the batch."""
    global_batch_size: int | None
    """Rollouts in one optimizer step; None as above."""
    optimizer_steps_per_rollout: int
    """Optimizer steps on one rollout batch, all its epochs together."""
    log_probs_max_tokens: int

    @classmethod
    def of(cls, config: Config) -> Numbers:
        """Raises Misfit where they do not fit together."""
        train = config.train
        samples, batch, steps = _batches(config)
        return Numbers(
            samples_per_rollout=samples,
            global_batch_size=batch,
            optimizer_steps_per_rollout=steps * train.num_epochs_per_rollout,
            log_probs_max_tokens=train.log_probs_max_tokens_per_gpu or train.max_tokens_per_gpu,
        )


@dataclass(frozen=True)
class Derived(Numbers):
    """The same, and those that follow, for epochs, from how many prompts there are."""

    num_rollout: int
    """Steps of the outer loop."""
    total_optimizer_steps: int

    @classmethod
    def of(cls, config: Config, prompts_per_epoch: int | None = None) -> Derived:
        """Raises ConfigError where the numbers do not fit together, or prompts must be known and are not."""
        rollout, numbers = config.rollout, Numbers.of(config)
        num_rollout = rollout.num_rollout
        if num_rollout is None:
            if rollout.num_epoch is None or prompts_per_epoch is None:
                raise ConfigError("give rollout.num_rollout (--num-rollout) or rollout.num_epoch (--num-epoch)")
            num_rollout = math.ceil(rollout.num_epoch * prompts_per_epoch / rollout.batch_size)
        total = numbers.optimizer_steps_per_rollout * num_rollout
        return cls(**vars(numbers), num_rollout=num_rollout, total_optimizer_steps=total)


def _batches(config: Config) -> tuple[int | None, int | None, int]:
    """Samples of a rollout batch, samples of an optimizer step, optimizer steps of one pass over the batch."""
    rollout, batch, steps = config.rollout, config.train.global_batch_size, config.train.num_steps_per_rollout
    groups = {task_set.n_samples_per_prompt or rollout.n_samples_per_prompt for task_set in config.data.sets}
    if len(groups) > 1:
        if batch is not None:
            sizes = ", ".join(map(str, sorted(groups)))
            raise Misfit(
                BATCH, batch,
                f"counts samples, but the training sets draw {sizes} of each prompt, so that batches differ in size",
                "give train.num_steps_per_rollout instead, or all sets the same n_samples_per_prompt",
            )  # fmt: skip
        return None, None, steps or 1
    group = groups.pop() if groups else rollout.n_samples_per_prompt
    samples = rollout.batch_size * group
    whole = f"the {samples} samples of a rollout batch ({rollout.batch_size} prompts x {group} samples)"
    if batch is None:
        if samples % (steps or 1):
            raise Misfit(STEPS, steps or 1, f"does not divide {whole}", f"give {near(samples, steps or 1)}")
        return samples, samples // (steps or 1), steps or 1
    if steps is not None and batch * steps != samples:
        raise Misfit(BATCH, batch, f"x train.num_steps_per_rollout={steps} is not {whole}", "give one of the two")
    if samples % batch:
        raise Misfit(BATCH, batch, f"does not divide {whole}", f"give {near(samples, batch)}")
    return samples, batch, samples // batch


def near(samples: int, wanted: int) -> str:
    """The divisors of a number of samples that are next to what was wanted."""
    divisors = [n for n in range(1, samples + 1) if samples % n == 0]
    below, above = [n for n in divisors if n < wanted], [n for n in divisors if n > wanted]
    *others, last = [str(n) for n in (*below[-2:], *above[:2])]
    return f"{', '.join(others)} or {last}" if others else last
