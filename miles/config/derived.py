"""Every value that follows from others is computed here, once; the config itself is never changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from miles.config.schema import Config
from miles.errors import ConfigError


@dataclass(frozen=True)
class Derived:
    """Numbers that follow from a config (and, for epochs, from how many prompts there are)."""

    num_rollout: int
    """Steps of the outer loop."""
    samples_per_rollout: int
    global_batch_size: int
    """Rollouts in one optimizer step."""
    optimizer_steps_per_rollout: int
    """Optimizer steps on one rollout batch, all its epochs together."""
    total_optimizer_steps: int
    world_size: int
    """Train ranks."""
    offload_train: bool
    offload_rollout: bool
    log_probs_max_tokens: int

    @classmethod
    def of(cls, config: Config, prompts_per_epoch: int | None = None) -> Derived:
        """Raises ConfigError where the numbers do not fit together."""
        rollout, train, resources = config.rollout, config.train, config.resources
        samples = rollout.batch_size * rollout.n_samples_per_prompt
        batch = cls._global_batch_size(config, samples)
        steps = samples // batch * train.num_epochs_per_rollout
        num_rollout = cls._num_rollout(config, prompts_per_epoch)
        return cls(
            num_rollout=num_rollout,
            samples_per_rollout=samples,
            global_batch_size=batch,
            optimizer_steps_per_rollout=steps,
            total_optimizer_steps=steps * num_rollout,
            world_size=resources.actor_num_nodes * resources.actor_num_gpus_per_node,
            offload_train=resources.colocate if resources.offload_train is None else resources.offload_train,
            offload_rollout=resources.colocate if resources.offload_rollout is None else resources.offload_rollout,
            log_probs_max_tokens=train.log_probs_max_tokens_per_gpu or train.max_tokens_per_gpu,
        )

    @staticmethod
    def _global_batch_size(config: Config, samples: int) -> int:
        train = config.train
        steps = train.num_steps_per_rollout
        if train.global_batch_size is None:
            if samples % (steps or 1):
                raise ConfigError(
                    f"train.num_steps_per_rollout={steps} does not divide the {samples} samples of a rollout batch "
                    f"(rollout.batch_size x rollout.n_samples_per_prompt)"
                )
            return samples // (steps or 1)
        if steps is not None and train.global_batch_size * steps != samples:
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} x train.num_steps_per_rollout={steps} is not the "
                f"{samples} samples of a rollout batch; give one of the two"
            )
        if samples % train.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} does not divide the {samples} samples of a rollout "
                f"batch ({config.rollout.batch_size} prompts x {config.rollout.n_samples_per_prompt} samples)"
            )
        return train.global_batch_size

    @staticmethod
    def _num_rollout(config: Config, prompts_per_epoch: int | None) -> int:
        rollout = config.rollout
        if rollout.num_rollout is not None:
            return rollout.num_rollout
        if rollout.num_epoch is None:
            raise ConfigError("give rollout.num_rollout (--num-rollout) or rollout.num_epoch (--num-epoch)")
        if prompts_per_epoch is None:
            return 0
        return math.ceil(rollout.num_epoch * prompts_per_epoch / rollout.batch_size)
