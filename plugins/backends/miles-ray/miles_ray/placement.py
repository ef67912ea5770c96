"""Room in the cluster for all groups of a run, reserved together: placement groups of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from miles.api import ConfigError, Seats, WorkerError


@dataclass(frozen=True)
class Bundle:
    """What is taken from one node: seats for some workers of a group."""

    group: str
    workers: int
    gpus: int
    """Of each worker."""
    cpus: float

    @property
    def resources(self) -> dict[str, float]:
        resources = {"CPU": self.cpus * self.workers}
        return {**resources, "GPU": self.gpus * self.workers} if self.gpus else resources


@dataclass(frozen=True)
class Seat:
    """Of one worker."""

    placement: PlacementGroup
    bundle: int
    node: str
    """Id of its node."""


def plan(seats: Mapping[str, Seats], cpus: float) -> list[tuple[str, list[Bundle]]]:
    """Strategy and bundles of each placement group.

    A group that asks for several nodes has a placement group of its own, with a bundle for all its workers of a node:
    each on another one. The workers of all other groups share one, with a bundle for each worker, on few nodes.

    Raises:
        ConfigError: workers cannot be spread evenly.
    """
    requests, single = [], []
    for name, asked in seats.items():
        if asked.workers % asked.nodes:
            raise ConfigError(f"{asked.workers} workers of {name!r} cannot be spread evenly over {asked.nodes} nodes")
        if asked.nodes > 1:
            bundle = Bundle(name, asked.workers // asked.nodes, asked.gpus, cpus)
            requests.append(("STRICT_SPREAD", [bundle] * asked.nodes))
        else:
            single += [Bundle(name, 1, asked.gpus, cpus)] * asked.workers
    return [*requests, ("PACK", single)] if single else requests


class Reservation:
    """Seats of every group, by rank; those of one node follow one another.

    Args:
        fixed: whether the cluster will not grow, so that what it lacks now it will always lack.
    """

    def __init__(self, seats: Mapping[str, Seats], cpus: float, timeout: float, fixed: bool):
        self.asked, self.timeout, self.fixed = seats, timeout, fixed
        self.requests = plan(seats, cpus)
        self.groups: list[PlacementGroup] = []
        self.seats: dict[str, list[Seat]] = {}

    async def reserve(self) -> None:
        """Raises:
        ConfigError: the cluster is too small.
        WorkerError: it has no room; nothing stays reserved.
        """
        if self.fixed and (lack := self._lack()):
            raise ConfigError(f"{lack}: {self._arithmetic()}")
        self.groups = [placement_group([b.resources for b in bundles], strategy) for strategy, bundles in self.requests]
        ready = asyncio.gather(*(_ready(group) for group in self.groups))
        try:
            await asyncio.wait_for(ready, self.timeout)
        except TimeoutError:
            lack, told = self._lack(), self._arithmetic()
            self.release()
            error = ConfigError if lack else WorkerError
            raise error(f"{lack or 'no room in the Ray cluster'} within {self.timeout:g} s: {told}") from None
        except BaseException:
            self.release()
            raise
        for group, (_, bundles) in zip(self.groups, self.requests, strict=True):
            for name, seat in _seats(group, bundles):
                self.seats.setdefault(name, []).append(seat)

    def release(self) -> None:
        for group in self.groups:
            remove_placement_group(group)
        self.groups, self.seats = [], {}

    def _lack(self) -> str:
        """What the cluster does not have at all; empty when it is large enough."""
        there, nodes = ray.cluster_resources(), len(_nodes())
        gpus = sum(asked.workers * asked.gpus for asked in self.asked.values())
        if gpus > there.get("GPU", 0):
            return f"the Ray cluster has too few GPUs, {there.get('GPU', 0):g}"
        most = max(asked.nodes for asked in self.asked.values())
        return f"the Ray cluster has too few nodes, {nodes}" if most > nodes else ""

    def _arithmetic(self) -> str:
        """What is asked, what there is, and what of it is free."""
        asked = [f"  {name}: {_described(seats)}" for name, seats in self.asked.items()]
        gpus = sum(seats.workers * seats.gpus for seats in self.asked.values())
        cpus = sum(bundle.resources["CPU"] for _, bundles in self.requests for bundle in bundles)
        there, free, nodes = ray.cluster_resources(), ray.available_resources(), _nodes()
        sizes = ", ".join(f"{node['NodeManagerAddress']} ({_amount(node['Resources'])})" for node in nodes)
        lines = [
            "asked for are",
            *asked,
            f"  together {_amount({'GPU': gpus, 'CPU': cpus})}",
            f"the cluster has {_amount(there)}, of which free: {_amount(free)}",
            f"  on {len(nodes)} node{'s' * (len(nodes) != 1)}: {sizes}",
        ]
        return "\n".join(lines)


async def _ready(group: PlacementGroup) -> None:
    await group.ready()


def _seats(group: PlacementGroup, bundles: list[Bundle]) -> Iterator[tuple[str, Seat]]:
    """The seats of each worker, with the name of its group: a node's after one another."""
    node_of: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    nodes = list(dict.fromkeys(node_of[index] for index in range(len(bundles))))
    for index in sorted(node_of, key=lambda index: (nodes.index(node_of[index]), index)):
        for _ in range(bundles[index].workers):
            yield bundles[index].group, Seat(group, index, node_of[index])


def _nodes() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]


def _described(seats: Seats) -> str:
    text = f"{seats.workers} worker{'s' * (seats.workers != 1)} x {seats.gpus} GPU"
    return (
        f"{text} on {seats.nodes} nodes, {seats.workers // seats.nodes * seats.gpus} GPU each"
        if seats.nodes > 1
        else text
    )


def _amount(resources: Mapping[str, float]) -> str:
    return f"{resources.get('GPU', 0):g} GPU, {resources.get('CPU', 0):g} CPU"
