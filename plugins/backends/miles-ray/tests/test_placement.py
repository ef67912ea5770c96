"""What is asked of the cluster, and what is said when it has not enough."""

import asyncio

import pytest

ray = pytest.importorskip("ray")

from miles_ray.executor import RayExecutor, _environments, _passed_on  # noqa: E402
from miles_ray.placement import Bundle, Reservation, Seat, plan  # noqa: E402
from miles_ray.plugin import RayOptions  # noqa: E402
from miles_ray.versions import differences  # noqa: E402

from miles.api import ConfigError, ExecutorContext, Seats, WorkerError  # noqa: E402


def test_groups_of_one_node_share_a_placement_group_and_others_have_their_own():
    seats = {"train": Seats(16, gpus=1, nodes=2), "rollout": Seats(2, gpus=4), "judge": Seats(1)}
    assert plan(seats, cpus=0.5) == [
        ("STRICT_SPREAD", [Bundle("train", 8, 1, 0.5)] * 2),
        ("PACK", [*[Bundle("rollout", 1, 4, 0.5)] * 2, Bundle("judge", 1, 0, 0.5)]),
    ]
    assert Bundle("train", 8, 1, 0.5).resources == {"CPU": 4.0, "GPU": 8}
    assert Bundle("judge", 1, 0, 0.5).resources == {"CPU": 0.5}


def test_workers_that_do_not_divide_by_nodes_are_refused():
    with pytest.raises(ConfigError, match="5 workers of 'train' cannot be spread evenly over 2 nodes"):
        plan({"train": Seats(5, nodes=2)}, cpus=0.01)


def test_ranks_are_counted_from_0_on_each_node():
    seats = [Seat(None, 0, "a"), Seat(None, 0, "a"), Seat(None, 1, "b"), Seat(None, 1, "b")]
    found = list(_environments(seats, "10.0.0.1", 29500, {"a": 4, "b": 2}))
    assert [(e["RANK"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"], e["OMP_NUM_THREADS"]) for e in found] == [
        ("0", "0", "2", "4"),
        ("1", "1", "2", "4"),
        ("2", "0", "2", "2"),
        ("3", "1", "2", "2"),
    ]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["WORLD_SIZE"]) for e in found} == {("10.0.0.1", "29500", "4")}


def test_settings_are_passed_on_and_secrets_are_not(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("JUDGE_URL", "http://judge")
    found = _passed_on(["JUDGE_URL", "NOT_SET"])
    assert (found["NCCL_NVLS_ENABLE"], found["HF_HOME"], found["JUDGE_URL"]) == ("1", "/models", "http://judge")
    assert found["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert {"HF_TOKEN", "NOT_SET", "PATH"} & set(found) == set()


def test_every_difference_of_versions_is_listed_by_node():
    driver = {"torch": "2.13.0", "ray": "2.60.0"}
    there = {"b": {"torch": "2.12.1", "miles": "0.1.0"}, "a": driver, "c": {**driver, "ray": "2.59.0"}}
    assert differences(driver, there) == [
        "b: miles 0.1.0, not none; ray none, not 2.60.0; torch 2.12.1, not 2.13.0",
        "c: ray 2.59.0, not 2.60.0",
    ]


@pytest.mark.usefixtures("cluster")
def test_what_the_cluster_does_not_have_is_refused_with_the_arithmetic():
    seats = {"train": Seats(2, gpus=1, nodes=2), "rollout": Seats(3, gpus=2)}
    executor = RayExecutor(RayOptions(placement_timeout=0.2), context=ExecutorContext(seats))
    with pytest.raises(ConfigError) as caught:
        asyncio.run(executor.launch("train", "nobody:Nothing"))
    told = str(caught.value).splitlines()
    assert told[0] == "the Ray cluster has too few GPUs, 2 within 0.2 s: asked for are"
    assert told[1:4] == [
        "  train: 2 workers x 1 GPU on 2 nodes, 1 GPU each",
        "  rollout: 3 workers x 2 GPU",
        "  together 8 GPU, 0.05 CPU",
    ]
    assert told[4].startswith("the cluster has 2 GPU, 4 CPU, of which free: ")
    assert told[5].startswith("  on 2 nodes: ")
    asyncio.run(executor.close())


@pytest.mark.usefixtures("cluster")
def test_a_cluster_that_will_not_grow_is_not_waited_for():
    with pytest.raises(ConfigError, match="too few nodes, 2: asked for are"):
        asyncio.run(Reservation({"train": Seats(3, nodes=3)}, 0.01, timeout=600, fixed=True).reserve())


@pytest.mark.usefixtures("cluster")
def test_a_cluster_whose_seats_are_taken_is_waited_for_and_what_was_reserved_is_given_back():
    async def main():
        taken = Reservation({"other": Seats(2, gpus=1)}, 0.01, timeout=10, fixed=False)
        await taken.reserve()
        late = Reservation({"train": Seats(2), "rollout": Seats(1, gpus=2)}, 0.01, timeout=0.2, fixed=False)
        with pytest.raises(WorkerError, match="no room in the Ray cluster within 0.2 s(.|\n)*of which free: 0 GPU"):
            await late.reserve()
        assert late.groups == []
        waiting = asyncio.ensure_future(Reservation({"late": Seats(1, gpus=2)}, 0.01, 10, False).reserve())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        taken.release()
        await waiting

    asyncio.run(main())
