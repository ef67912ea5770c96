"""`precision`, `moe`, `weight_sync`, `resources`, `checkpoint`, `eval` and `plugins`: what surrounds the algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from miles.config.base import AUTO, ComponentSpec, Flag, Section, Spec
from miles.config.data import TaskSet


class PrecisionSection(Section):
    scheme: Annotated[ComponentSpec, Flag("--precision-scheme")] = Spec(name="plain")
    """Number formats of training and of the synced weights."""


class MoeSection(Section):
    routing_replay: Annotated[ComponentSpec, Flag("--routing-replay")] = Spec(name="none")
    """Record and replay expert choices."""


class WeightSyncSection(Section):
    transport: Annotated[ComponentSpec, Flag("--weight-sync", "--update-weight-transfer-mode")] = Spec(name=AUTO)
    """How weights reach the engines; `auto` is `inprocess` beside the trainer, `broadcast` to workers of their own."""
    interval: Annotated[int, Flag("--update-weights-interval"), Field(gt=0)] = 1
    """Rollout steps between two syncs."""
    buffer_size: Annotated[int, Flag("--update-weight-buffer-size"), Field(gt=0)] = 512 * 1024**2
    """Bytes sent at once, by transports that send in buckets; `inprocess` hands over one tensor at a time."""
    verify: Annotated[Literal["first", "always", "never"], Flag("--weight-sync-verify")] = "first"
    """Compare log-probabilities of engine and trainer after the first sync of a run, after each, or never."""
    tolerance: Annotated[float | None, Flag("--weight-sync-tolerance")] = None
    """Largest mean difference a token; the precision scheme's own when not given."""


class ResourcesSection(Section):
    executor: Annotated[ComponentSpec, Flag("--executor")] = Spec(name=AUTO)
    """Where workers run; `auto` is `inprocess` for one rank, `local` for several on one node, `ray` for more nodes."""
    device: Annotated[str, Flag("--device")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    actor_num_nodes: Annotated[int, Flag("--actor-num-nodes"), Field(gt=0)] = 1
    """Machines that train."""
    actor_num_gpus_per_node: Annotated[int, Flag("--actor-num-gpus-per-node"), Field(gt=0)] = 1
    """Train ranks on each machine."""
    rollout_num_gpus: Annotated[int | None, Flag("--rollout-num-gpus"), Field(gt=0)] = None
    """GPUs that engines have to themselves; without it they share the trainer's devices."""
    rollout_num_gpus_per_engine: Annotated[int, Flag("--rollout-num-gpus-per-engine"), Field(gt=0)] = 1
    """GPUs of one engine."""
    colocate: Annotated[bool, Flag("--colocate")] = False
    """Trainer and engines share accelerators and take turns."""
    offload_train: Annotated[bool | None, Flag("--offload-train")] = None
    """Move the trainer off the accelerator during rollouts; follows `colocate` when not given."""
    offload_rollout: Annotated[bool | None, Flag("--offload-rollout")] = None
    """Put engines to sleep during training; follows `colocate` when not given."""
    worker_timeout: Annotated[float, Flag("--worker-timeout"), Field(gt=0)] = 1800.0
    """Seconds after which a worker that does not answer a call is taken to hang."""
    max_restarts: Annotated[int, Flag("--max-restarts"), Field(ge=0)] = 0
    """Times a run that lost a worker starts again from its last checkpoint by itself."""


class CheckpointSection(Section):
    dir: Annotated[Path | None, Flag("--save")] = None
    """Where checkpoints go; `checkpoints/` of the run directory when not given."""
    load: Annotated[Path | None, Flag("--load")] = None
    """Checkpoint (or folder of them) of another run to start from."""
    interval: Annotated[int | None, Flag("--save-interval"), Field(gt=0)] = None
    """Steps between checkpoints; a tenth of the run when not given. There is always one at the end."""
    keep: Annotated[int | None, Flag("--keep-checkpoints"), Field(gt=0)] = 2
    """Newest checkpoints that are kept; all of them when null."""
    save_hf: Annotated[str | None, Flag("--save-hf")] = None
    """Folder of a Hugging Face export beside each checkpoint; `{step}` is replaced. Relative to the run directory."""


class EvalSection(Section):
    sets: tuple[TaskSet, ...] = ()
    """Held-out task sets."""
    evaluator: Annotated[ComponentSpec, Flag("--evaluator")] = Spec(name="rollout")
    """How they are measured."""
    interval: Annotated[int | None, Flag("--eval-interval"), Field(gt=0)] = None
    """Steps between evaluations; if not given, before and after training. For no evaluation leave eval.sets out."""
    before_train: Annotated[bool, Flag("--eval-before-train")] = True
    """Evaluate before the first step."""
    pass_k: Annotated[tuple[int, ...], Flag("--eval-pass-k")] = ()
    """k of pass@k; powers of two up to the number of samples when not given."""


class PluginsSection(Section):
    require: Annotated[tuple[str, ...], Flag("--plugins-require")] = ()
    """Distributions that must be installed, such as `miles-grpo>=0.1`."""
    block: Annotated[tuple[str, ...], Flag("--plugins-block")] = ()
    """Plugins that are not loaded (`-p no:NAME`)."""
