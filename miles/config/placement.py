"""Where trainer and engines live, and on how many devices: computed here, once, from the configuration and what the
chosen components say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.config.base import AUTO, Spec
from miles.config.derived import Misfit, near
from miles.config.schema import Config
from miles.errors import UnknownNameError
from miles.log import counted
from miles.registry import Registry

Place = Literal["driver", "beside", "apart", "elsewhere"]
APART: Place = "apart"
BESIDE: Place = "beside"
ELSEWHERE: Place = "elsewhere"
"""Where engines are; also what weight syncs say in `provides`: which engines they reach."""


@dataclass(frozen=True)
class Placement:
    """Workers and devices of a run."""

    train_ranks: int
    """Train workers: each holds a share of the policy and of the other models (critic, reference, teachers)."""
    executor: Spec
    """Starts the workers; never `auto`."""
    one_process: bool
    """The one train worker is in the driver's process."""
    transport: Spec
    """Brings weights to the engines; never `auto`."""
    engines: Place
    """`driver`: in the driver's process, because the train worker is there too, or because it holds no model.
    `beside`: in the processes of the train workers, one a rank. `apart`: in workers of their own. `elsewhere`: servers
    that nobody here starts or stops; the driver speaks to them."""
    num_engines: int
    gpus_per_engine: int
    """1 where engines share the trainer's devices."""
    gpus: int
    """GPUs in all; 0 where `resources.device` is cpu. With `auto`, what is needed where there are any."""
    arithmetic: str
    """How that number comes about: `4 train ranks (1 node x 4) + 2 for 2 engines = 6 GPUs`."""
    offload_train: bool
    """The trainer leaves the accelerator during rollouts."""
    offload_rollout: bool
    """The engines leave it during training."""

    @classmethod
    def of(cls, config: Config, registry: Registry) -> Placement:
        """Raises:
        Misfit: the configuration asks for what cannot be.
        UnknownNameError: no installed plugin offers the engine, the executor or the transport that it names.
        """
        resources = config.resources
        ranks = resources.actor_num_nodes * resources.actor_num_gpus_per_node
        trainer = f"{counted(ranks, 'train rank')} ({_nodes(config)})"
        if ranks % config.train.context_parallel_size:
            problem = f"does not divide the {trainer}, which share the tokens of a sample by it"
            remedy = f"give {near(ranks, config.train.context_parallel_size)}"
            raise Misfit("train.context_parallel_size", config.train.context_parallel_size, problem, remedy)
        shares = config.train.reproducible_ranks
        if shares is not None and shares % ranks:
            problem = f"micro-batches that are planned for {shares} ranks cannot be divided among {trainer}"
            raise Misfit("train.reproducible_ranks", shares, problem, f"give a multiple of {ranks}, or train on fewer")
        engines, per_engine = _engines(config, registry, ranks)
        executor, one_process = _executor(config, registry, ranks, engines)
        place: Place = APART if engines else BESIDE if generates(config, registry) and not one_process else "driver"
        if _elsewhere(config, registry):
            place = ELSEWHERE
        transport = _transport(config, registry, place)
        gpus, arithmetic = ranks + engines * per_engine, trainer
        if engines:
            arithmetic += f" + {engines * per_engine} for {counted(engines, 'engine')}"
        arithmetic += f" = {counted(gpus, 'GPU')}"
        if ":" in resources.device and not one_process:
            problem = f"names one device, and executor {executor.name!r} gives each worker its own: {arithmetic}"
            raise Misfit("resources.device", resources.device, problem, "--device cuda, or CUDA_VISIBLE_DEVICES")
        return cls(
            train_ranks=ranks,
            executor=executor,
            one_process=one_process,
            transport=transport,
            engines=place,
            num_engines=engines or (ranks if place == BESIDE else 1),
            gpus_per_engine=per_engine,
            gpus=0 if resources.device == "cpu" else gpus,
            arithmetic=arithmetic,
            offload_train=resources.colocate if resources.offload_train is None else resources.offload_train,
            offload_rollout=resources.colocate if resources.offload_rollout is None else resources.offload_rollout,
        )


def _nodes(config: Config) -> str:
    resources = config.resources
    return f"{counted(resources.actor_num_nodes, 'node')} x {resources.actor_num_gpus_per_node}"


def generates(config: Config, registry: Registry) -> bool:
    """Whether the engine says that it gives responses; one given as an object says so itself."""
    entry = registry.entry("rollout_engines", config.rollout.engine.name)
    return "responses" in entry.component.provides or getattr(entry.live, "generates", False)


def _elsewhere(config: Config, registry: Registry) -> bool:
    return ELSEWHERE in registry.component("rollout_engines", config.rollout.engine.name).provides


def _engines(config: Config, registry: Registry, ranks: int) -> tuple[int, int]:
    """How many engines have workers of their own, 0 for none, and the GPUs of each."""
    resources, count, name = config.resources, config.rollout.num_engines, config.rollout.engine.name
    gpus, per_engine = resources.rollout_num_gpus, resources.rollout_num_gpus_per_engine
    idle = "generates nothing" if not generates(config, registry) else ""
    away = "speaks to servers elsewhere" if _elsewhere(config, registry) else ""
    for key, value in {"resources.rollout_num_gpus": gpus, "rollout.num_engines": count}.items():
        if value is not None and (idle or away):
            problem = f"the engine {name!r} {idle or away}: there is one, and it needs no GPU"
            raise Misfit(key, value, problem, "leave it out")
    if resources.colocate and away:
        raise Misfit("resources.colocate", True, f"the engine {name!r} {away}: it shares no device", "--no-colocate")
    shared = resources.colocate or (gpus is None and count is None)
    key = "resources.rollout_num_gpus_per_engine"
    if per_engine > 1 and "several gpus" not in registry.component("rollout_engines", name).provides:
        remedy = "--rollout-num-gpus-per-engine 1, or another --rollout-engine"
        raise Misfit(key, per_engine, f"the engine {name!r} runs on one GPU", remedy)
    if per_engine > 1 and shared:
        problem = "engines that share the trainer's devices have one each"
        raise Misfit(key, per_engine, problem, "give engines GPUs of their own: --rollout-num-gpus, without --colocate")
    if resources.colocate and gpus not in (None, ranks):
        problem = f"engines are on the trainer's devices with --colocate: {_nodes(config)} = {counted(ranks, 'GPU')}"
        raise Misfit("resources.rollout_num_gpus", gpus, problem, "leave it out, or --no-colocate")
    if resources.colocate and count not in (None, ranks):
        problem = f"there is one engine a train rank with --colocate: {_nodes(config)} = {counted(ranks, 'engine')}"
        raise Misfit("rollout.num_engines", count, problem, "leave it out, or --no-colocate")
    if shared:
        return 0, per_engine
    if gpus is None:
        return count or 0, per_engine
    if gpus % per_engine:
        problem = f"is not a multiple of the {per_engine} GPUs of an engine (--rollout-num-gpus-per-engine)"
        raise Misfit("resources.rollout_num_gpus", gpus, problem, f"give {-(-gpus // per_engine) * per_engine}")
    engines = gpus // per_engine
    if count not in (None, engines):
        problem = f"rollout_num_gpus={gpus} / rollout_num_gpus_per_engine={per_engine} = {counted(engines, 'engine')}"
        raise Misfit("rollout.num_engines", count, problem, "give one of the two")
    return engines, per_engine


def _executor(config: Config, registry: Registry, ranks: int, engines: int) -> tuple[Spec, bool]:
    """Who starts the workers, and whether the one worker shares the driver's process."""
    resources = config.resources
    chosen = "ray" if resources.actor_num_nodes > 1 else "local" if ranks > 1 or engines else "inprocess"
    spec = _chosen(registry, "executors", "resources.executor", resources.executor, chosen)
    says, who = registry.component("executors", spec.name).provides, f"executor {spec.name!r}"
    which = "actor_num_gpus_per_node" if resources.actor_num_gpus_per_node > 1 else "actor_num_nodes"
    if "one rank" in says and ranks > 1:
        remedy = "--actor-num-nodes 1 --actor-num-gpus-per-node 1, or another executor"
        problem = f"{who} starts one train rank, not {ranks}"
        raise Misfit(f"resources.{which}", getattr(resources, which), problem, remedy)
    if "one rank" in says and engines:
        problem = f"starts one train rank with its engine, and {counted(engines, 'engine')} want workers of their own"
        raise Misfit("resources.executor", spec, problem, "--executor local, or leave --rollout-num-gpus out")
    if "one node" in says and resources.actor_num_nodes > 1:
        problem = f"{who} starts workers on this machine alone, and there are {_nodes(config)} = {ranks} ranks"
        raise Misfit("resources.actor_num_nodes", resources.actor_num_nodes, problem, "--executor ray")
    return spec, "one rank" in says


def _transport(config: Config, registry: Registry, place: Place) -> Spec:
    """How weights reach engines at a place."""
    wanted, chosen = {APART: (APART, "broadcast"), ELSEWHERE: (ELSEWHERE, "disk")}.get(place, (BESIDE, "inprocess"))
    spec = _chosen(registry, "weight_syncs", "weight_sync.transport", config.weight_sync.transport, chosen)
    says = {BESIDE, APART, ELSEWHERE} & set(registry.component("weight_syncs", spec.name).provides)
    if says and wanted not in says and generates(config, registry):
        others = [offer.name for offer in registry.offers("weight_syncs") if wanted in offer.value.provides]
        where = {
            APART: "reaches engines in the trainer's processes, and these have workers of their own",
            BESIDE: "goes from process to process, and the engines are in the trainer's: none can send to itself",
            ELSEWHERE: "does not reach servers elsewhere",
        }
        raise Misfit("weight_sync.transport", spec, where[wanted], f"--weight-sync {' or '.join(others) or AUTO}")
    return spec


def _chosen(registry: Registry, kind: str, key: str, spec: Spec, name: str) -> Spec:
    """`spec` itself, or, where it says `auto`, the component of that name."""
    if spec.name != AUTO:
        return spec
    try:
        registry.component(kind, name)
    except UnknownNameError as error:
        raise Misfit(key, spec, f"it comes to {name!r}, and {error}", "install it, or name another one") from error
    return Spec(name=name)
