"""From a config to the parts of a run: names become objects here, once, before the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.checkpoint import Checkpoint
from miles.checkpoint_io import resolve_checkpoint
from miles.component import TEACHER_NEEDS
from miles.config import Config, Spec, TaskSet
from miles.config.components import component_needs, learns_without_rewards, needs_of
from miles.config.derived import Derived
from miles.config.teacher import POLICY
from miles.crew import Crew, engine_setup, launch_train, make_crew, make_engine, make_engines
from miles.errors import ConfigError
from miles.log import logger
from miles.modeling import (
    AUTO,
    automatic,
    chat_format_for,
    end_token_ids,
    load_hf_config,
    load_tokenizer,
    precision_for,
)
from miles.options import options_of
from miles.protocols import (
    ChatFormat,
    DataContext,
    DataSource,
    Evaluator,
    RolloutEngine,
    SyncContext,
    WeightSync,
    WorkerGroup,
)
from miles.registry import Registry
from miles.residency import TRAINING, Residency
from miles.rollout.dump import Dump
from miles.rollout.engines import EngineFront
from miles.rollout.gate import Gate
from miles.rollout.producer import Batches, Producer, Waves
from miles.rollout.replay import Replay
from miles.rollout.stream import Pace, Stream
from miles.rollout.task import Task
from miles.tracking import Tracking
from miles.training.flops import ForwardCost
from miles.training.probe import WeightProbe
from miles.training.teachers import Teachers, model_name
from miles.training.trainer import Trainer
from miles.training.worker import ModelSetup
from miles.types import Prompt


@dataclass
class Model:
    """The policy's checkpoint and what is read from it."""

    checkpoint: Path
    hf_config: Any
    tokenizer: Any
    chat: ChatFormat


@dataclass
class EvaluationParts:
    """What evaluation alone needs. Stands where evaluators otherwise find a `Run`."""

    config: Config
    registry: Registry
    model: Model
    front: EngineFront
    evaluator: Evaluator

    def load_prompts(self, task_set: TaskSet) -> list[Prompt]:
        """All usable prompts of a set, in file order, each once; the others are counted in a warning."""
        source = make_source(self.config, self.registry, self.model, [task_set], shuffle=False)
        prompts = source.every_prompt()
        if dropped := {name: count for name, count in getattr(source, "counts", {}).items() if count}:
            logger.warning("set %s: %d prompts, without %s", task_set.name, len(prompts), dropped)
        return prompts

    def eval_task(self, task_set: TaskSet) -> Task:
        return make_task(self.config, self.registry, self.model, self.front, task_set, evaluation=True)


@dataclass
class Parts(EvaluationParts):
    """Everything a run works with."""

    gate: Gate
    """For what is trained on; `front` is for evaluation."""
    workers: WorkerGroup
    engines: list[RolloutEngine]
    residency: Residency
    weight_sync: WeightSync
    producer: Batches
    trainer: Trainer
    tracking: Tracking
    probe: WeightProbe | None
    dump: Dump | None = None
    """Where every batch is written, when that is asked for."""


def load_model(config: Config, registry: Registry) -> Model:
    """Find the checkpoint (fetching it from the hub if need be) and read its config and tokenizer."""
    if config.model.hf_checkpoint is None:
        raise ConfigError("model.hf_checkpoint is not set: name a folder or a hub checkpoint with --hf-checkpoint")
    trust = config.model.trust_remote_code
    checkpoint = resolve_checkpoint(config.model.hf_checkpoint, config.model.revision)
    hf_config = load_hf_config(checkpoint, trust)
    tokenizer = load_tokenizer(checkpoint, trust)
    chat = chat_format_for(registry, config, hf_config, tokenizer, end_token_ids(checkpoint))
    return Model(checkpoint, hf_config, tokenizer, chat)


def context_limit(config: Config, model: Model) -> int | None:
    """Tokens of the longest trajectory, prompt included; None when neither the config nor the model says."""
    return config.rollout.max_context_len or getattr(model.hf_config, "max_position_embeddings", None)


def make_source(config: Config, registry: Registry, model: Model, sets: Sequence[TaskSet], shuffle: bool) -> DataSource:
    """Prompts that leave no room in the context for one token of response are dropped, whatever the config says of
    `max_prompt_len`."""
    data, context_len = config.data, context_limit(config, model)
    longest = [limit for limit in (data.max_prompt_len, context_len and context_len - 1) if limit is not None]
    context = DataContext(
        sets=sets,
        chat=model.chat,
        seed=data.seed,
        max_prompt_tokens=min(longest, default=None),
        shuffle=shuffle,
        bad_lines=data.bad_lines,
    )
    return registry.build("data_sources", data.source, context=context)


def make_producer(
    config: Config, registry: Registry, model: Model, source: DataSource, gate: Gate, batches: int
) -> Producer:
    """What fills so many batches, in the mode of rollout that was asked for."""
    rollout = config.rollout
    tasks = {task_set.name: make_task(config, registry, model, gate, task_set) for task_set in config.data.sets}
    filters = [registry.build("sample_filters", spec) for spec in rollout.filters]
    parts = (config, source, tasks, filters)
    greedy, unjudged = "greedy_rollout" in needs_of(config, registry), learns_without_rewards(config, registry)
    if rollout.mode == "sync" and not rollout.partial_rollout:
        return Waves(*parts, greedy=greedy, unjudged=unjudged)
    return Stream(*parts, gate=gate, pace=Pace.of(rollout, batches), greedy=greedy, unjudged=unjudged)


def make_task(
    config: Config,
    registry: Registry,
    model: Model,
    front: EngineFront,
    task_set: TaskSet,
    evaluation: bool = False,
) -> Task:
    longest = context_limit(config, model)
    return Task(task_set, config, registry, front, model.chat, evaluation=evaluation, max_context_tokens=longest)


async def make_teachers(crew: Crew, model: Model) -> Teachers | None:
    """The driver's half of the teachers that the algorithm needs, speaking to those on servers; None without need."""
    config, registry, section = crew.config, crew.registry, crew.config.teacher
    needs = component_needs(config, registry)
    if not needs & TEACHER_NEEDS or not (section.load or section.urls):
        return None
    engines = {}
    for name, url in section.urls.items():
        chosen = automatic(registry, section.engine or Spec(name=AUTO), "rollout_engines", "scores")
        spec = Spec(name=chosen.name, options={**chosen.options, "url": url})
        engines[name] = await make_engine(crew, engine_setup(crew, spec, model.checkpoint))
    top_k = 0
    if section.urls and "teacher_top_k" in needs:
        loss = config.algorithm.policy_loss
        options = options_of(registry.component("policy_losses", loss.name).options)
        if "k" not in options:
            raise ConfigError(f"policy loss {loss.name!r} needs teacher_top_k and has no option `k` that says how many")
        top_k = loss.options.get("k", options["k"].default)
    return Teachers(section, engines, model.chat, config.rollout_temperature, "teacher" in needs, top_k)


async def build(config: Config, registry: Registry, tracking: Tracking, stack: AsyncExitStack) -> tuple[Derived, Parts]:
    """Build everything. Files are read and weights are loaded, but nothing is generated or trained.

    What has to be closed is given to `stack` as soon as it exists, so that nothing is left behind when a later part
    cannot be built.
    """
    model = load_model(config, registry)
    source = Replay(config) if config.rollout.replay else training_source(config, registry, model)
    derived = Derived.of(config, prompts_per_epoch=len(source))
    dump = Dump(config.rollout.dump, "miles train", config) if config.rollout.dump else None
    models = train_models(config, derived, registry, model)
    crew = make_crew(config, registry, stack, trains=True)
    workers = await launch_train(crew, models)
    if crew.placement.offload_train:
        await workers.call("offload", TRAINING)  # engines take of the memory that they find free
    engines = await make_engines(crew, model.checkpoint)
    at_once, steps = config.rollout.concurrency, derived.num_rollout
    teachers = await make_teachers(crew, model)
    gate = Gate(engines, at_once)
    producer = source if isinstance(source, Replay) else make_producer(config, registry, model, source, gate, steps)
    stack.push_async_callback(producer.close)
    weight_sync = make_sync(crew, model)
    await weight_sync.connect(workers, engines)
    shares = await workers.call("data_share")
    parts = Parts(
        config=config,
        registry=registry,
        model=model,
        workers=workers,
        engines=engines,
        front=EngineFront(engines, at_once),
        gate=gate,
        residency=Residency(workers, engines, crew.placement.offload_train, crew.placement.offload_rollout),
        weight_sync=weight_sync,
        producer=producer,
        trainer=Trainer(
            config, derived, registry, workers, shares, teachers, ForwardCost.of(model.hf_config), producer.on_policy
        ),
        evaluator=registry.build("evaluators", config.eval.evaluator),
        tracking=tracking,
        probe=make_probe(config, registry, model, engines) if engines[0].generates else None,
        dump=dump,
    )
    return derived, parts


def training_source(config: Config, registry: Registry, model: Model) -> DataSource:
    return make_source(config, registry, model, config.data.sets, config.data.shuffle)


def make_sync(crew: Crew, model: Model) -> WeightSync:
    config = crew.config
    # Half of what a worker has: the sync says more of who does not answer than the worker that waits for him.
    buffer_size, timeout = config.weight_sync.buffer_size, config.resources.worker_timeout / 2
    context = SyncContext(model.checkpoint, config.run.dir, buffer_size, timeout)
    return crew.registry.build("weight_syncs", crew.placement.transport, context=context)


async def evaluation_parts(
    config: Config, registry: Registry, stack: AsyncExitStack, checkpoint: Checkpoint | None
) -> EvaluationParts:
    """An evaluator, and engines as of `serve_weights`."""
    model = load_model(config, registry)
    engines = await serve_weights(config, registry, model, stack, checkpoint)
    front = EngineFront(engines, config.rollout.concurrency)
    return EvaluationParts(config, registry, model, front, registry.build("evaluators", config.eval.evaluator))


async def serve_weights(
    config: Config, registry: Registry, model: Model, stack: AsyncExitStack, checkpoint: Checkpoint | None
) -> list[RolloutEngine]:
    """Engines for a job without training, with the weights of `model.hf_checkpoint`, or with those of a checkpoint of
    miles, which come to them through a trainer."""
    crew = make_crew(config, registry, stack, trains=checkpoint is not None)
    if checkpoint is None:
        engines = await make_engines(crew, model.checkpoint, load_weights=True)
    else:
        workers = await launch_train(crew, {"actor": ModelSetup("actor", model.checkpoint)})
        engines = await make_engines(crew, model.checkpoint)
        await workers.call("load", checkpoint.path, weights_only=True)
        weight_sync = make_sync(crew, model)
        await weight_sync.connect(workers, engines)
        await weight_sync.push(version=checkpoint.step)
    return engines


def train_models(config: Config, derived: Derived, registry: Registry, model: Model) -> dict[str, ModelSetup]:
    """The models that training needs: the policy, and what the algorithm asks for."""

    def checkpoint(name: str | None) -> Path:
        return resolve_checkpoint(name) if name else model.checkpoint

    steps, needs = derived.total_optimizer_steps, component_needs(config, registry)
    models = {"actor": ModelSetup("actor", model.checkpoint, steps)}
    if "reference" in needs:
        models["reference"] = ModelSetup("reference", checkpoint(config.model.ref_load))
    if needs & TEACHER_NEEDS:
        for name, place in config.teacher.load.items():
            if place != POLICY:
                models[model_name(config.teacher, name)] = ModelSetup("teacher", resolve_checkpoint(place))
    if "critic" in needs:
        alone = config.critic.only_steps * derived.optimizer_steps_per_rollout
        models["actor"] = ModelSetup("actor", model.checkpoint, max(steps - alone, 0))
        models["critic"] = ModelSetup("critic", checkpoint(config.critic.load), steps)
    return models


def make_probe(
    config: Config, registry: Registry, model: Model, engines: Sequence[RolloutEngine]
) -> WeightProbe | None:
    """The check after a weight sync, unless it is off."""
    section = config.weight_sync
    if section.verify == "never":
        return None
    tolerance = section.tolerance
    if tolerance is None:
        tolerance = precision_for(registry, config).logprob_tolerance
    limits = [
        getattr(model.hf_config, "max_position_embeddings", None),
        *(getattr(engine, "max_len", None) for engine in engines),
    ]
    longest = min((limit for limit in limits if limit is not None), default=None)
    return WeightProbe(model.hf_config.vocab_size, tolerance, config.rollout_temperature, longest)
