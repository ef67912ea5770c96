"""One train rank: builds the models of its roles and works on the micro-batches that the driver hands it.

The driver talks to it through a `WorkerGroup`: method names, plain data and target strings cross, nothing else.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from miles.checkpoint_io import write_checkpoint
from miles.component import TEACHER_LOGITS
from miles.config import NONE, Config
from miles.config.components import component_needs
from miles.errors import OutOfMemoryError
from miles.modeling import bridge_for, load_hf_config, precision_for, transforms_for
from miles.protocols import BackendContext, RankPart, Role, TrainBackend, TrainPart, Want
from miles.registry import Registry
from miles.targets import import_target
from miles.training.critic import ValueObjective
from miles.training.objective import Objective
from miles.training.packing import build_micro_batch, split_by_sample, split_micro_batch, take_samples
from miles.training.table import Table
from miles.training.teachers import TeacherLogits, model_name
from miles.types import Metrics, MicroBatch, StepReport
from miles.workers.entry import enter, join_process_group

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSetup:
    """What one of a rank's models is built from."""

    role: Role
    checkpoint: Path
    total_steps: int = 0
    """Optimizer steps it will take; 0 for a model that does not learn."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a rank is built from; everything in it can cross to another process."""

    config: Config
    models: Mapping[str, ModelSetup]
    """By name: that of the role where there is one of a role (`actor`, `critic`, `reference`)."""
    device: str
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
    """Times that it, or a forward pass since the step before, was started again with smaller micro-batches."""
    losses: Mapping[int, float] = field(default_factory=dict)
    """Sample id -> mean policy loss of its trainable tokens, before the step."""


class TrainWorker:
    """The worker's half of training. In the driver's process it shares the driver's `registry`; elsewhere it loads the
    plugins anew and makes sure that they are the driver's."""

    def __init__(self, rank: int, size: int, setup: WorkerSetup, registry: Registry | None = None):
        config = setup.config
        registry = registry or enter(config, rank, setup.provenance)
        self.rank, self.size, self.setup, self.registry = rank, size, setup, registry
        self.compares_logits = bool(config.teacher.load and component_needs(config, registry) & TEACHER_LOGITS)
        self.wants: dict[str, frozenset[Want]] = {
            "actor": loss_wants(config, registry),
            "critic": frozenset({"values"}),
        }
        if size > 1:
            join_process_group(setup.device, config.resources.worker_timeout)
        registry.plugins.hook.miles_on_worker_start(role="train", rank=rank, config=config)
        self.contexts = {name: self._context(model) for name, model in setup.models.items()}
        build = partial(registry.build, "train_backends", config.train.train_backend)
        self.models: dict[str, TrainBackend] = {name: build(context=c) for name, c in self.contexts.items()}
        loss = registry.build("policy_losses", config.algorithm.policy_loss)
        masks = [(spec.name, registry.build("loss_masks", spec)) for spec in config.algorithm.loss_masks]
        self.losses: dict[str, Objective | ValueObjective] = {
            "actor": Objective(config.algorithm, loss, masks),
            "critic": ValueObjective(config.critic.value_clip),
        }
        self.retries = Counter[str]()
        """After memory ran out, of models that learn, since their last step; those of others are the actor's."""

    def _context(self, model: ModelSetup) -> BackendContext:
        setup, config = self.setup, self.setup.config
        hf_config = load_hf_config(model.checkpoint, config.model.trust_remote_code)
        return BackendContext(
            config=config,
            role=model.role,
            checkpoint=model.checkpoint,
            hf_config=hf_config,
            bridge=bridge_for(self.registry, config, hf_config),
            precision=precision_for(self.registry, config),
            transforms=transforms_for(self.registry, config),
            rank=self.rank,
            world_size=self.size,
            device=setup.device,
            total_steps=model.total_steps,
            temperature=config.rollout_temperature,
        )

    # ------------------------------------------------------------------------------------------------------ numbers

    def data_share(self) -> DataShare:
        together = all(getattr(model, "shares_prompts", False) for model in self.models.values())
        return DataShare(self.models["actor"].data_rank, together)

    def forward(self, name: str, tables: Sequence[Table], want: Sequence[Want]) -> list[dict[str, list[np.ndarray]]]:
        """What a model says: per table, per wanted quantity, one array a sample."""
        model, wanted = self.models[name], frozenset(want)
        batches, outputs = self._fitting(name, tables, lambda batches: model.forward(batches, wanted))
        pairs = list(zip(outputs, batches, strict=True))
        columns = {key: [row for o, b in pairs for row in _per_sample(getattr(o, f"{key}_T"), b)] for key in want}
        bounds = [0, *accumulate(len(table) for table in tables)]
        return [{key: rows[start:end] for key, rows in columns.items()} for start, end in pairwise(bounds)]

    def train_step(self, name: str, tables: Sequence[Table], tokens: float) -> StepOutcome:
        """One optimizer step of a model on these micro-batches; on all ranks it trains so many `tokens`."""
        model, objective = self.models[name], self.losses[name]
        objective.tokens = tokens
        taught = objective if isinstance(objective, Objective) and self.compares_logits else None

        def step(batches: Sequence[MicroBatch]) -> tuple[dict[str, Tensor], StepReport]:
            model.zero_grad()
            objective.losses = []
            if taught is not None:
                taught.teacher_logits = None  # of an attempt that did not fit
                taught.teacher_logits = self._teachers_on(batches, tables)
            sums = model.forward_backward(batches, objective, self.wants[name])
            return sums, model.optim_step()

        sums, report = self._fitting(name, tables, step)[1]
        model.zero_grad()
        if taught is not None:
            taught.teacher_logits = None
        losses = {i: loss for ids, loss_N in objective.losses for i, loss in zip(ids, loss_N.tolist(), strict=True)}
        metrics = {metric: float(value) for metric, value in sums.items()}
        return StepOutcome(metrics, report, self.retries.pop(name, 0), losses)

    def _teachers_on(
        self, batches: Sequence[MicroBatch], tables: Sequence[Table]
    ) -> Callable[[MicroBatch], TeacherLogits]:
        """Has the teachers that are here read the micro-batches; what they said of each."""
        section, rows = self.setup.config.teacher, [pair for t in tables for pair in zip(t.ids, t.lessons, strict=True)]
        teachers = sorted({model_name(section, name) for name in section.load})
        said = TeacherLogits.ask(batches, dict(rows), self.models, teachers)
        of_samples = {tuple(b.sample_ids): logits for b, logits in zip(batches, said, strict=True)}
        return lambda batch: of_samples[tuple(batch.sample_ids)]

    def _fitting(
        self, name: str, tables: Sequence[Table], act: Callable[[Sequence[MicroBatch]], T]
    ) -> tuple[list[MicroBatch], T]:
        """Has a model do something with a micro-batch a table; also returns these. Out of memory, on whichever rank,
        starts it again with halves: nothing is lost, since the weight of each token does not depend on the micro-batch
        it is in."""
        batches, retries, alike = [self._pack(table) for table in tables], 0, self.models[name].data_size > 1
        while True:
            try:
                return batches, act(batches)
            except torch.OutOfMemoryError as error:
                if self.size > 1 and not hasattr(error, "rank"):
                    raise  # of this rank alone: the others know nothing of it and go on
                batches = self._smaller(batches, retries, error, alike)
                retries += 1
                self.retries[name if name in self._learning else "actor"] += 1

    def _pack(self, table: Table) -> MicroBatch:
        batch = build_micro_batch(
            list(range(len(table))), table.tokens, table.columns,
            specs=table.specs, multimodal=table.multimodal, device=self.setup.device,
        )  # fmt: skip
        return replace(batch, sample_ids=table.ids)

    def _smaller(self, batches: list[MicroBatch], retries: int, error: Any, alike: bool) -> list[MicroBatch]:
        """The same samples in micro-batches of half the tokens, or an error that says what would help. `alike`: twice
        as many on all ranks, so that what cannot be halved gets an empty one for its other half."""
        train = self.setup.config.train
        alone = getattr(error, "alone", max(len(batch) for batch in batches) == 1)
        if alone or retries >= train.max_oom_retries:
            tokens = getattr(error, "tokens", 0) or max(batch.bounds[-1] for batch in batches)
            reason = "one sample alone" if alone else f"after {retries} retries a micro-batch"
            raise OutOfMemoryError(
                f"out of memory on rank {getattr(error, 'rank', self.rank)}: {reason} of {tokens} tokens does not fit. "
                "Lower --rollout-max-response-len or --rollout-max-context-len, turn on --gradient-checkpointing, "
                f"lower --log-probs-chunk-size (now {train.log_probs_chunk_size}) or --max-tokens-per-gpu (now "
                f"{train.max_tokens_per_gpu}), or use --train-dtype bf16."
            ) from error
        error.__traceback__ = None  # it holds the activations that did not fit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller: list[MicroBatch] = []
        for batch in batches:
            smaller += split_micro_batch(batch) if len(batch) > 1 else [batch]
            smaller += [take_samples(batch, 0, 0)] if alike and len(batch) < 2 else []
        return smaller

    # ------------------------------------------------------------------------------------------------------- weights

    def send_weights(self, target: str, *args: Any, **kwargs: Any) -> Any:
        """The sending half of a weight sync: `target(weights, ...)` with this rank's weight stream."""
        context = self.contexts["actor"]
        weights = self.models["actor"].named_weights()
        for transform in context.transforms:
            weights = transform.synced(weights)
        exported = context.precision.export(weights) if context.precision else weights
        return import_target(target)(exported, *args, **kwargs)

    def save(self, directory: Path) -> None:
        """Every model that learns, and this rank's random states."""
        for name in self._learning:
            self.models[name].save(directory / name)
        torch.save(_random_state(), directory / self._random_file)

    def load(self, directory: Path, weights_only: bool = False) -> None:
        """What `save` wrote; with `weights_only` another run's weights, to start from: a critic with a start of its own
        keeps that, and one that finds no critic there takes the policy's."""
        for name in self._learning:
            beginning = name == "critic" and weights_only
            if beginning and self.setup.config.critic.load is not None:
                continue
            if beginning and not (directory / name).exists():
                self.models[name].take_weights(self.models["actor"].named_weights())
            else:
                self.models[name].load(directory / name, weights_only)
        random = directory / self._random_file  # nothing in training draws from it, so a rank may come without
        if not weights_only and random.exists():
            _set_random_state(torch.load(random, weights_only=True))

    @property
    def _learning(self) -> list[str]:
        return [name for name in self.models if name in self.losses]

    @property
    def _random_file(self) -> str:
        return f"random-{self.rank:05d}.pt"

    def export_hf(self, directory: Path) -> None:
        """Write the actor as a Hugging Face checkpoint; rank 0 writes, all ranks walk the weights."""
        write_checkpoint(
            directory, self.models["actor"].named_weights(), self.contexts["actor"].checkpoint, write=self.rank == 0
        )

    def offload(self, parts: frozenset[RankPart]) -> None:
        for name, model in self.models.items():
            model.offload(_parts_of(name, parts))

    def onload(self, parts: frozenset[RankPart]) -> None:
        for name, model in self.models.items():
            model.onload(_parts_of(name, parts))


def _parts_of(model: str, parts: frozenset[RankPart]) -> frozenset[TrainPart]:
    """What of one model belongs to these parts of the rank."""
    own: RankPart = "policy" if model == "actor" else "other models"
    found: list[TrainPart] = ["parameters"] if own in parts else []
    return frozenset([*found, *(part for part in ("gradients", "optimizer") if part in parts)])


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
    algorithm = config.algorithm
    if algorithm.advantage_estimator.name != NONE or algorithm.entropy_coef or "entropy" in needs:
        wanted.add("entropy")  # a policy that explores is watched by its entropy, whether it is paid for it or not
    if "logits" in needs:
        wanted.add("logits")
    return frozenset(wanted)


def _per_sample(values_T: Tensor, batch: MicroBatch) -> list[np.ndarray]:
    values = values_T.to(torch.promote_types(values_T.dtype, torch.float32)).cpu()
    return [piece.numpy() for piece in split_by_sample(values, batch.bounds)]
