"""`rollout`: how many samples, from which engine, in which mode."""

from __future__ import annotations

from pathlib import Path
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
    """Whether rollouts wait for training (`sync`), are generated while the batch before them is trained on
    (`one_step_off`), or never stop (`fully_async`)."""
    partial_rollout: Annotated[bool, Flag("--partial-rollout")] = False
    """A batch is full when enough groups have ended; the others are interrupted, and go on first in the next step."""
    mask_offpolicy_in_partial_rollout: Annotated[bool, Flag("--mask-offpolicy-in-partial-rollout")] = False
    """Of a rollout that went on in a later step, train on the tokens of the newest weights alone."""
    max_weight_staleness: Annotated[int | None, Flag("--max-weight-staleness"), Field(ge=0)] = None
    """Most steps that the weights which drew a group's oldest token may be behind those that are trained on it. None: 1
    in `fully_async`, no limit with `partial_rollout`."""
    stale_groups: Annotated[
        Literal["wait", "drop", "retry"], Flag("--stale-groups", "--async-unused-samples-handler")
    ] = "wait"
    """What becomes of groups that take so long that they would be too old: the batch waits for them, they are dropped,
    or dropped and their prompts asked again. What is dropped is what is long."""
    pause_mode: Annotated[Literal["retract", "abort", "in_place"], Flag("--pause-generation-mode")] = "retract"
    """How requests that are under way wait for new weights in `fully_async`: put back and computed anew, aborted and
    asked again for the rest, or frozen with a cache of the old weights."""
    num_rollout: Annotated[int | None, Flag("--num-rollout"), Field(ge=0)] = None
    """Steps of the outer loop; or give `num_epoch`."""
    num_epoch: Annotated[float | None, Flag("--num-epoch"), Field(gt=0)] = None
    """Passes over the prompts, when `num_rollout` is not given."""
    batch_size: Annotated[int, Flag("--rollout-batch-size"), Field(gt=0)] = 32
    """Prompts in a rollout batch."""
    n_samples_per_prompt: Annotated[int, Flag("--n-samples-per-prompt"), Field(gt=0)] = 8
    """Samples in a group."""
    over_sampling_batch_size: Annotated[int | None, Flag("--over-sampling-batch-size")] = None
    """Prompts asked for at a time while a batch fills, or under way at once with `partial_rollout`; `batch_size` when
    not given."""
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
    """Samples in flight at once; as many again of evaluation."""
    dump_samples: Annotated[int | None, Flag("--dump-samples")] = None
    """Samples of each batch written to `rollouts/`; all of them when not given, 0 for none."""
    dump: Annotated[Path | None, Flag("--dump-rollouts", "--dump")] = None
    """Folder to which every batch is written, exactly, for `miles train --replay`."""
    replay: Annotated[Path | None, Flag("--replay")] = None
    """Train on the batches of this folder, which `--dump-rollouts` or `miles rollout` has written. No engine is
    started, whatever is said of engines elsewhere."""

    @property
    def most_staleness(self) -> int | None:
        """`max_weight_staleness`, or what it is when not given."""
        by_itself = 1 if self.mode == "fully_async" else None
        return by_itself if self.max_weight_staleness is None else self.max_weight_staleness
