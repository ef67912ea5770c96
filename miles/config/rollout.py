"""`rollout`: how many samples, from which engine, in which mode."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.base import ComponentSpec, ComponentSpecs, Flag, Section, Spec


class RolloutSection(Section):
    engine: Annotated[ComponentSpec, Flag("--rollout-engine")] = Spec(name="torch")
    """Generates tokens; `none` when nothing is generated (SFT)."""
    num_engines: Annotated[int | None, Flag("--rollout-num-engines"), Field(gt=0)] = None
    """Engines; follows from `resources` when not given. Without `--rollout-num-gpus` and `--colocate`, that many in
    workers of their own."""
    mode: Annotated[Literal["sync", "one_step_off", "fully_async"], Flag("--rollout-mode")] = "sync"
    """Whether rollouts wait for training."""
    num_rollout: Annotated[int | None, Flag("--num-rollout"), Field(ge=0)] = None
    """Steps of the outer loop; or give `num_epoch`."""
    num_epoch: Annotated[float | None, Flag("--num-epoch"), Field(gt=0)] = None
    """Passes over the prompts, when `num_rollout` is not given."""
    batch_size: Annotated[int, Flag("--rollout-batch-size"), Field(gt=0)] = 32
    """Prompts in a rollout batch."""
    n_samples_per_prompt: Annotated[int, Flag("--n-samples-per-prompt"), Field(gt=0)] = 8
    """Samples in a group."""
    over_sampling_batch_size: Annotated[int | None, Flag("--over-sampling-batch-size")] = None
    """Prompts asked for at a time while a batch fills; `batch_size` when not given."""
    filters: Annotated[ComponentSpecs, Flag("--rollout-filters")] = ()
    """Groups that any of these rejects are replaced by new ones."""
    max_filtered_batches: Annotated[int, Flag("--max-filtered-batches"), Field(gt=0)] = 20
    """Give up, with an error, after drawing this many times the batch without filling it."""
    incomplete_groups: Annotated[Literal["survivors", "refill"], Flag("--incomplete-groups")] = "survivors"
    """When samples of a group failed: use the rest with a baseline over the survivors, or replace the group."""
    max_attempts: Annotated[int, Flag("--max-sample-attempts"), Field(gt=0)] = 2
    """Attempts at a sample whose generation failed."""
    max_failed_fraction: Annotated[float, Flag("--max-failed-fraction"), Field(ge=0, le=1)] = 0.5
    """Stop with an error when more than this share of a batch failed."""
    max_engine_restarts: Annotated[int, Flag("--max-engine-restarts"), Field(ge=0)] = 3
    """Times in a run that an engine which was lost is started again; the next loss is an error."""
    max_context_len: Annotated[int | None, Flag("--rollout-max-context-len")] = None
    """Longest trajectory in tokens, prompt included; the model's own limit when not given."""
    concurrency: Annotated[int, Flag("--rollout-concurrency", "--sglang-server-concurrency"), Field(gt=0)] = 512
    """Samples in flight at once."""
    dump_samples: Annotated[int | None, Flag("--dump-samples")] = None
    """Samples of each batch written to `rollouts/`; all of them when not given, 0 for none."""
