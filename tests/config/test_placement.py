"""Where everything runs: settings in, places and counts out, worked out by hand."""

import types

import pytest

from miles.api import Component, hookimpl
from miles.config import Config
from miles.config.derived import Misfit
from miles.config.placement import Placement
from miles.errors import UnknownNameError
from miles.plugins import load_plugins
from miles.registry import Registry


class Parts(types.SimpleNamespace):
    """Engines, executors and weight syncs of every sort."""

    __name__ = "parts"

    @hookimpl
    def miles_register_rollout_engines(self):
        return {
            "torch": Component("parts:Torch", provides=("responses",)),
            "wide": Component("parts:Wide", provides=("responses", "several gpus")),
            "distant": Component("parts:Distant", provides=("responses", "elsewhere")),
            "none": Component("parts:Nothing"),
        }

    @hookimpl
    def miles_register_executors(self):
        return {
            "inprocess": Component("parts:InProcess", provides=("one rank",)),
            "local": Component("parts:Local", provides=("one node",)),
            "cloud": Component("parts:Cloud"),
        }

    @hookimpl
    def miles_register_weight_syncs(self):
        return {
            "inprocess": Component("parts:HandOver", provides=("beside",)),
            "broadcast": Component("parts:Broadcast", provides=("apart",)),
            "disk": Component("parts:Disk", provides=("beside", "apart", "elsewhere")),
            "somebodys": Component("parts:Somebodys"),
        }


@pytest.fixture(scope="module")
def registry():
    return Registry(load_plugins(block=["builtin", "ray"], extra=[Parts()]))


def config(nodes=1, each=1, *, engine="torch", engines=None, sync="auto", executor="auto", **resources):
    resources |= {"actor_num_nodes": nodes, "actor_num_gpus_per_node": each, "executor": executor}
    rollout = {"engine": engine, "num_engines": engines}
    return Config.model_validate({"rollout": rollout, "resources": resources, "weight_sync": {"transport": sync}})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("inprocess", "inprocess", "driver", 1, 1)),
        ({"colocate": True}, ("inprocess", "inprocess", "driver", 1, 1)),
        ({"executor": "local"}, ("local", "inprocess", "beside", 1, 1)),
        ({"executor": "cloud", "sync": "disk"}, ("cloud", "disk", "beside", 1, 1)),
        ({"each": 4}, ("local", "inprocess", "beside", 4, 4)),
        ({"each": 4, "colocate": True, "rollout_num_gpus": 4}, ("local", "inprocess", "beside", 4, 4)),
        ({"each": 4, "colocate": True, "engines": 4}, ("local", "inprocess", "beside", 4, 4)),
        ({"nodes": 2, "each": 4, "executor": "cloud"}, ("cloud", "inprocess", "beside", 8, 8)),
        ({"rollout_num_gpus": 1}, ("local", "broadcast", "apart", 1, 2)),
        ({"each": 4, "rollout_num_gpus": 2}, ("local", "broadcast", "apart", 2, 6)),
        ({"engines": 3}, ("local", "broadcast", "apart", 3, 4)),
        ({"engines": 3, "rollout_num_gpus": 3, "sync": "disk"}, ("local", "disk", "apart", 3, 4)),
        ({"engines": 2, "sync": "somebodys"}, ("local", "somebodys", "apart", 2, 3)),
        (
            {"engine": "wide", "rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 4},
            ("local", "broadcast", "apart", 2, 9),
        ),
        ({"engine": "distant"}, ("inprocess", "disk", "elsewhere", 1, 1)),
        ({"engine": "distant", "each": 2}, ("local", "disk", "elsewhere", 1, 2)),
        ({"engine": "none"}, ("inprocess", "inprocess", "driver", 1, 1)),
        ({"engine": "none", "each": 2}, ("local", "inprocess", "driver", 1, 2)),
    ],
)
def test_where_everything_goes(registry, settings, expected):
    placed = Placement.of(config(**settings), registry)
    found = (placed.executor.name, placed.transport.name, placed.engines, placed.num_engines, placed.gpus)
    assert found == expected
    assert placed.train_ranks == settings.get("nodes", 1) * settings.get("each", 1)


def test_the_arithmetic_is_shown(registry):
    def says(**settings):
        return Placement.of(config(**settings), registry).arithmetic

    assert says() == "1 train rank (1 node x 1) = 1 GPU"
    assert says(each=4, engines=2) == "4 train ranks (1 node x 4) + 2 for 2 engines = 6 GPUs"
    wide = {"engine": "wide", "rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 4}
    assert says(nodes=2, each=3, executor="cloud", **wide) == (
        "6 train ranks (2 nodes x 3) + 8 for 2 engines = 14 GPUs"
    )


def test_a_cpu_has_no_gpus(registry):
    assert Placement.of(config(each=4, engines=2, device="cpu"), registry).gpus == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (False, False)),
        ({"colocate": True}, (True, True)),
        ({"colocate": True, "offload_train": False}, (False, True)),
        ({"offload_rollout": True}, (False, True)),
    ],
)
def test_who_makes_room(registry, settings, expected):
    placed = Placement.of(config(**settings), registry)
    assert (placed.offload_train, placed.offload_rollout) == expected


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        (
            {"each": 4, "colocate": True, "rollout_num_gpus": 2}, "resources.rollout_num_gpus",
            "on the trainer's devices with --colocate: 1 node x 4 = 4 GPUs",
        ),
        ({"each": 4, "colocate": True, "engines": 2}, "rollout.num_engines", "1 node x 4 = 4 engines"),
        (
            {"engine": "wide", "rollout_num_gpus": 6, "rollout_num_gpus_per_engine": 4}, "resources.rollout_num_gpus",
            "not a multiple of the 4 GPUs of an engine.*; give 8",
        ),
        (
            {"engine": "wide", "rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 4, "engines": 4},
            "rollout.num_engines", "rollout_num_gpus=8 / rollout_num_gpus_per_engine=4 = 2 engines",
        ),
        (
            {"rollout_num_gpus": 4, "rollout_num_gpus_per_engine": 2}, "resources.rollout_num_gpus_per_engine",
            "the engine 'torch' runs on one GPU",
        ),
        (
            {"engine": "wide", "each": 4, "rollout_num_gpus_per_engine": 2}, "resources.rollout_num_gpus_per_engine",
            "have one each; give engines GPUs of their own",
        ),
        ({"engine": "none", "rollout_num_gpus": 1}, "resources.rollout_num_gpus", "'none' generates nothing"),
        ({"engine": "none", "engines": 1}, "rollout.num_engines", "'none' generates nothing"),
        (
            {"each": 8, "executor": "inprocess"}, "resources.actor_num_gpus_per_node",
            "executor 'inprocess' starts one train rank, not 8",
        ),
        ({"nodes": 2, "executor": "inprocess"}, "resources.actor_num_nodes", "starts one train rank, not 2"),
        ({"engines": 2, "executor": "inprocess"}, "resources.executor", "2 engines want workers.*--executor local"),
        (
            {"nodes": 2, "each": 4, "executor": "local"}, "resources.actor_num_nodes",
            "on this machine alone, and there are 2 nodes x 4 = 8 ranks; --executor ray",
        ),
        ({"engines": 1, "sync": "inprocess"}, "weight_sync.transport", "workers.*--weight-sync broadcast or disk"),
        ({"each": 2, "sync": "broadcast"}, "weight_sync.transport", "itself; --weight-sync disk or inprocess"),
        ({"engine": "distant", "rollout_num_gpus": 1}, "resources.rollout_num_gpus", "'distant' speaks to servers"),
        ({"engine": "distant", "colocate": True}, "resources.colocate", "shares no device"),
        ({"engine": "distant", "sync": "broadcast"}, "weight_sync.transport", "elsewhere; --weight-sync disk"),
        ({"each": 2, "device": "cuda:1"}, "resources.device", r"own: 2 train ranks \(1 node x 2\) = 2 GPUs"),
        ({"executor": "local", "device": "cuda:1"}, "resources.device", "'local' gives each.*CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_what_cannot_be(registry, settings, key, words):
    with pytest.raises(Misfit, match=words) as raised:
        Placement.of(config(**settings), registry)
    assert raised.value.key == key


def test_several_nodes_need_an_executor_that_is_somewhere_else(registry):
    with pytest.raises(Misfit, match="it comes to 'ray', and no .*executor 'ray'.*miles-ray.*; install it") as raised:
        Placement.of(config(nodes=2), registry)
    assert raised.value.key == "resources.executor"
    with pytest.raises(UnknownNameError, match="'ray'"):
        Placement.of(config(nodes=2, executor="ray"), registry)


def test_ranks_that_cannot_share_the_tokens_of_a_sample(registry):
    ranks = {"resources": {"actor_num_gpus_per_node": 4}}
    Placement.of(Config.model_validate({**ranks, "train": {"context_parallel_size": 2}}), registry)
    with pytest.raises(Misfit, match=r"size=3 does not divide the 4 train ranks \(1 node x 4\).*; give 1, 2 or 4"):
        Placement.of(Config.model_validate({**ranks, "train": {"context_parallel_size": 3}}), registry)


def test_a_plan_that_cannot_be_divided_among_the_ranks(registry):
    ranks = {"resources": {"actor_num_gpus_per_node": 3}}
    Placement.of(Config.model_validate({**ranks, "train": {"reproducible_ranks": 6}}), registry)
    with pytest.raises(Misfit, match=r"for 4 ranks cannot be divided among 3 train ranks \(1 node x 3\); .* of 3"):
        Placement.of(Config.model_validate({**ranks, "train": {"reproducible_ranks": 4}}), registry)


def test_an_engine_given_as_an_object_says_whether_it_generates(registry):
    class Mine:
        generates = True

    registry.add("rollout_engines", "mine", Mine)
    assert Placement.of(config(each=2, engine="mine"), registry).engines == "beside"
