"""One train rank: builds the models of its roles and works on the micro-batches that the driver hands it.

The driver talks to it through a `WorkerGroup`: method names, plain data and target strings cross, nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miles.checkpoint_io import write_checkpoint
from miles.config import NONE, Config
from miles.determinism import prepare_process
from miles.errors import OutOfMemoryError
from miles.modeling import bridge_for, load_hf_config, precision_for, transforms_for
from miles.plugins import load_plugins
from miles.protocols import BackendContext, Role, TrainBackend, TrainPart, Want
from miles.registry import Registry
from miles.targets import import_target
from miles.training.advantages import component_needs
from miles.training.objective import Objective, StepScope
from miles.training.packing import build_micro_batch, split_micro_batch
from miles.training.table import Table
from miles.types import Metrics, MicroBatch, StepReport


@dataclass(frozen=True)
class WorkerSetup:
    """What a rank is built from; everything in it can cross to another process."""

    config: Config
    checkpoint: Path
    reference_checkpoint: Path
    roles: tuple[Role, ...]
    device: str
    total_steps: int
    temperature: float
    provenance: Sequence[Mapping[str, Any]] = ()
    """The driver's plugins, to compare with."""


class DataShare(NamedTuple):
    """What of each batch a rank works on."""

    part: int
    """Ranks that split a model have the same one."""
    together: bool
    """Samples of one prompt cost less in one micro-batch (`MicroBatch.shared`)."""


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step on one rank."""

    sums: Metrics
    report: StepReport
    out_of_memory: int
    """Times the step was started again with smaller micro-batches."""
    losses: Mapping[int, float] = field(default_factory=dict)
    """Sample id -> mean policy loss of its trainable tokens, before the step."""


class TrainWorker:
    """The worker's half of training. In the driver's process it shares the driver's `registry`; elsewhere it loads the
    plugins anew and makes sure that they are the driver's."""

    def __init__(self, rank: int, size: int, setup: WorkerSetup, registry: Registry | None = None):
        config = setup.config
        if registry is None:
            plugins = load_plugins(block=config.plugins.block, require=config.plugins.require)
            plugins.verify(setup.provenance)
            registry = Registry(plugins)
            prepare_process(config.run, rank)
        self.rank, self.size, self.setup, self.registry = rank, size, setup, registry
        registry.plugins.hook.miles_on_worker_start(role="train", rank=rank, config=config)
        self.contexts = {role: self._context(role) for role in setup.roles}
        build = partial(registry.build, "train_backends", config.train.train_backend)
        self.models: dict[Role, TrainBackend] = {role: build(context=c) for role, c in self.contexts.items()}
        loss = registry.build("policy_losses", config.algorithm.policy_loss)
        masks = [(spec.name, registry.build("loss_masks", spec)) for spec in config.algorithm.loss_masks]
        self.objective = Objective(config.algorithm, loss, masks)
        self.want = loss_wants(config, registry)

    def _context(self, role: Role) -> BackendContext:
        setup, config = self.setup, self.setup.config
        checkpoint = setup.reference_checkpoint if role == "reference" else setup.checkpoint
        hf_config = load_hf_config(checkpoint, config.model.trust_remote_code)
        return BackendContext(
            config=config,
            role=role,
            checkpoint=checkpoint,
            hf_config=hf_config,
            bridge=bridge_for(self.registry, config, hf_config),
            precision=precision_for(self.registry, config),
            transforms=transforms_for(self.registry, config),
            rank=self.rank,
            world_size=self.size,
            device=setup.device,
            total_steps=setup.total_steps,
            temperature=setup.temperature,
        )

    # ------------------------------------------------------------------------------------------------------ numbers

    def data_share(self) -> DataShare:
        together = all(getattr(model, "shares_prompts", False) for model in self.models.values())
        return DataShare(self.models["actor"].data_rank, together)

    def forward(self, role: Role, tables: Sequence[Table], want: Sequence[Want]) -> list[dict[str, list[np.ndarray]]]:
        """Per table, per wanted quantity, one array a sample. Micro-batches that do not fit are halved."""
        wanted = frozenset(want)
        return [self._forward_one(self.models[role], self._pack(table), wanted) for table in tables]

    def _forward_one(
        self, model: TrainBackend, batch: MicroBatch, want: frozenset[Want], retries: int = 0
    ) -> dict[str, list[np.ndarray]]:
        try:
            (outputs,) = model.forward([batch], want)
        except torch.OutOfMemoryError as error:
            halves = self._smaller([batch], retries, error)
            parts = [self._forward_one(model, half, want, retries + 1) for half in halves]
            return {name: [array for part in parts for array in part[name]] for name in want}
        return {name: _per_sample(getattr(outputs, f"{name}_T"), batch) for name in want}

    def train_step(self, tables: Sequence[Table], scope: StepScope) -> StepOutcome:
        """One optimizer step on these micro-batches. Out of memory starts it again with halves: nothing is lost,
        since the weight of each token does not depend on the micro-batch it is in."""
        actor = self.models["actor"]
        self.objective.scope = scope
        batches = [self._pack(table) for table in tables]
        retries = 0
        while True:
            try:
                actor.zero_grad()
                self.objective.losses = []
                sums = actor.forward_backward(batches, self.objective, self.want)
                report = actor.optim_step()
                break
            except torch.OutOfMemoryError as error:
                batches = self._smaller(batches, retries, error)
                retries += 1
        actor.zero_grad()
        losses = {
            i: loss for ids, loss_N in self.objective.losses for i, loss in zip(ids, loss_N.tolist(), strict=True)
        }
        return StepOutcome({name: float(value) for name, value in sums.items()}, report, retries, losses)

    def _pack(self, table: Table) -> MicroBatch:
        rows, device = list(range(len(table))), self.setup.device
        batch = build_micro_batch(rows, table.tokens, table.columns, multimodal=table.multimodal, device=device)
        return replace(batch, sample_ids=table.ids)

    def _smaller(self, batches: list[MicroBatch], retries: int, error: Exception) -> list[MicroBatch]:
        """The same samples in micro-batches of half the tokens, or an error that says what would help."""
        train = self.setup.config.train
        largest = max(len(batch) for batch in batches)
        if largest == 1 or retries >= train.max_oom_retries:
            tokens = max(batch.bounds[-1] for batch in batches)
            reason = "one sample alone" if largest == 1 else f"after {retries} retries a micro-batch"
            raise OutOfMemoryError(
                f"out of memory on rank {self.rank}: {reason} of {tokens} tokens does not fit. Lower "
                "--rollout-max-response-len or --rollout-max-context-len, turn on --gradient-checkpointing, lower "
                f"--log-probs-chunk-size (now {train.log_probs_chunk_size}) or --max-tokens-per-gpu (now "
                f"{train.max_tokens_per_gpu}), or use --train-dtype bf16."
            ) from error
        error.__traceback__ = None  # it holds the activations that did not fit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [half for batch in batches for half in (split_micro_batch(batch) if len(batch) > 1 else [batch])]

    # ------------------------------------------------------------------------------------------------------- weights

    def send_weights(self, target: str, **arguments: Any) -> Any:
        """The sending half of a weight sync: `target(weights, **arguments)` with this rank's weight stream."""
        context = self.contexts["actor"]
        weights = self.models["actor"].named_weights()
        for transform in context.transforms:
            weights = transform.synced(weights)
        exported = context.precision.export(weights) if context.precision else weights
        return import_target(target)(exported, **arguments)

    def save(self, directory: Path) -> None:
        """Every model that learns, and this rank's random states."""
        for role, model in self.models.items():
            if role != "reference":
                model.save(directory / role)
        torch.save(_random_state(), directory / self._random_file)

    def load(self, directory: Path, weights_only: bool = False) -> None:
        """What `save` wrote; with `weights_only` another run's weights, to start from."""
        for role, model in self.models.items():
            if role != "reference":
                model.load(directory / role, weights_only)
        if not weights_only:
            _set_random_state(torch.load(directory / self._random_file, weights_only=True))

    @property
    def _random_file(self) -> str:
        return f"random-{self.rank:05d}.pt"

    def export_hf(self, directory: Path) -> None:
        """Write the actor as a Hugging Face checkpoint; rank 0 writes, all ranks walk the weights."""
        write_checkpoint(directory, self.models["actor"].named_weights(), self.setup.checkpoint, write=self.rank == 0)

    def offload(self, parts: frozenset[TrainPart]) -> None:
        for model in self.models.values():
            model.offload(parts)

    def onload(self, parts: frozenset[TrainPart]) -> None:
        for model in self.models.values():
            model.onload(parts)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def loss_wants(config: Config, registry: Registry) -> frozenset[Want]:
    """What the objective is given besides log-probabilities."""
    needs = component_needs(config, registry)
    wanted: set[Want] = {"log_probs"}
    if config.algorithm.advantage_estimator.name != NONE or "entropy" in needs:
        wanted.add("entropy")  # a policy that explores is watched by its entropy, whether it is paid for it or not
    if "logits" in needs:
        wanted.add("logits")
    return frozenset(wanted)


def _per_sample(values_T: Tensor, batch: MicroBatch) -> list[np.ndarray]:
    values = values_T.float().cpu().numpy()
    return [values[start:end] for start, end in zip(batch.bounds, batch.bounds[1:], strict=False)]
