"""Two groups in one placement group: where their workers are, what they are told, and what crosses to them."""

import asyncio
import logging
import os

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from miles_ray import executor as module  # noqa: E402
from miles_ray.executor import RayExecutor  # noqa: E402
from miles_ray.versions import versions  # noqa: E402

from miles.api import ConfigError, ExecutorContext, Seats, WorkerError  # noqa: E402


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def groups(cluster, runner, worker, run_dir):
    """`train` with two workers and `rollout` with one, on a GPU."""
    context = ExecutorContext({"train": Seats(2), "rollout": Seats(1, gpus=1)}, run_dir, timeout=60)
    executor = RayExecutor(context=context)

    async def launch():
        return {name: await executor.launch(name, worker) for name in context.seats}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_DEBUG", "WARN")
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield runner.run(launch())
    runner.run(executor.close())
    assert ray.is_initialized(), "the cluster of somebody else was left"


@pytest.fixture(scope="module")
def facts(groups, runner):
    async def ask():
        return [*await groups["train"].call("facts"), *await groups["rollout"].call("facts")]

    return runner.run(ask())


def test_workers_are_processes_with_seats_in_one_placement_group(facts):
    assert len({os.getpid(), *(fact["pid"] for fact in facts)}) == 4
    (group,) = {fact["group"] for fact in facts}
    table = ray.util.placement_group_table()[group]
    assert table["state"] == "CREATED"
    assert list(table["bundles"].values()) == [{"CPU": 0.01}, {"CPU": 0.01}, {"CPU": 0.01, "GPU": 1.0}]


def test_workers_find_the_environment_of_torchrun_and_their_own_gpus_alone(facts):
    first, second, rollout = (fact["environment"] for fact in facts)
    assert (first["RANK"], first["WORLD_SIZE"], first["LOCAL_RANK"]) == ("0", "2", "0")
    assert (second["RANK"], second["WORLD_SIZE"]) == ("1", "2")
    assert (rollout["RANK"], rollout["WORLD_SIZE"], rollout["LOCAL_WORLD_SIZE"]) == ("0", "1", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != rollout["MASTER_PORT"]
    assert first["CUDA_VISIBLE_DEVICES"] == second["CUDA_VISIBLE_DEVICES"] == ""
    assert rollout["CUDA_VISIBLE_DEVICES"] in ("0", "1")


def test_the_drivers_settings_and_directory_come_along(facts):
    for fact in facts:
        assert fact["environment"]["NCCL_DEBUG"] == "WARN"
        assert fact["environment"]["NCCL_NVLS_ENABLE"] == "0"
        assert fact["environment"]["OMP_NUM_THREADS"] == "1"
        assert fact["directory"] == os.getcwd()


def test_torch_distributed_needs_no_arguments(groups, runner):
    async def main():
        return await groups["train"].call_each("sum_over_ranks", [(3,), (4,)])

    assert runner.run(main()) == [7.0, 7.0]


def test_big_arrays_are_stored_once_and_arrive_writable(groups, runner, monkeypatch):
    stored, put = [], ray.put
    monkeypatch.setattr(ray, "put", lambda thing: stored.append(thing) or put(thing))
    array = np.arange(1_000_000)

    async def main():
        return await groups["train"].call("double", array)

    for doubled in runner.run(main()):
        assert np.array_equal(doubled, 2 * np.arange(1_000_000))
    assert len(stored) == 1
    assert np.array_equal(array, np.arange(1_000_000))


def test_calls_begin_in_their_order_on_every_rank(groups, runner):
    """A small call that came after a big one would overtake it on its way."""

    async def main():
        sizes = [2_000_000, 1, 500_000, 1, 1, 200_000, 1]
        calls = (groups["train"].call("note", str(i), np.zeros(size)) for i, size in enumerate(sizes))
        return (await asyncio.gather(*calls))[-1]

    assert runner.run(main()) == [list("0123456")] * 2


def test_a_call_that_is_given_up_ends_in_the_worker(groups, runner):
    async def main():
        waiting = asyncio.ensure_future(groups["rollout"].call_one(0, "wait"))
        while await groups["rollout"].call_one(0, "look") != "waiting":
            await asyncio.sleep(0.01)
        waiting.cancel()
        while await groups["rollout"].call_one(0, "look") == "waiting":
            await asyncio.sleep(0.01)
        return await groups["rollout"].call_one(0, "look")

    assert runner.run(asyncio.wait_for(main(), 10)) == "given up"


def test_a_worker_that_wants_to_exit_does_not(groups, runner):
    async def main():
        with pytest.raises(WorkerError, match="SystemExit: 3"):
            await groups["rollout"].call("leave")
        return await groups["rollout"].call("look")

    assert len(runner.run(main())) == 1


def test_what_workers_print_and_log(groups, runner, run_dir, caplog):
    async def main():
        await groups["train"].call("speak")
        while caplog.text.count("worried") < 2:
            await asyncio.sleep(0.05)

    with caplog.at_level(logging.INFO, "miles"):
        runner.run(asyncio.wait_for(main(), 10))
    said = {record.getMessage() for record in caplog.records}
    assert said == {"[train 0] rank 0 is well", "[train 0] rank 0 is worried", "[train 1] rank 1 is worried"}
    for rank in range(2):
        log = (run_dir / "logs" / f"train-{rank}.log").read_text()
        assert f"printed by rank {rank}\nfrom a program that it started\nrank {rank} is well\n" in log


def test_a_worker_that_dies_is_said_with_rays_reason_and_its_last_words(cluster, worker, tmp_path):
    async def main():
        executor = RayExecutor(context=ExecutorContext({"train": Seats(1)}, tmp_path, timeout=60))
        try:
            group = await executor.launch("train", worker)
            with pytest.raises(WorkerError) as caught:
                await group.call("lament_and_die")
        finally:
            await executor.close()
        return str(caught.value)

    told = asyncio.run(main()).splitlines()
    assert told[0] == "train rank 0 died in lament_and_die:"
    assert "    the last that was heard of it" in told
    assert told[-1].startswith("Worker unexpectedly exits with a connection error"), told[-1]


def test_groups_over_several_nodes_and_logs_of_machines_that_see_nothing_of_the_driver(
    cluster, worker, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "_marked", _unseen)

    async def main():
        executor = RayExecutor(context=ExecutorContext({"train": Seats(2, nodes=2)}, tmp_path, timeout=60))
        try:
            group = await executor.launch("train", worker)
            facts = await group.call("facts")
            await group.call("speak")
            theirs = [link.place.log for link in group.links]
        finally:
            await executor.close()
        return facts, theirs

    facts, theirs = asyncio.run(main())
    assert {fact["node"] for fact in facts} == {node["NodeID"] for node in ray.nodes()}
    assert ray.util.placement_group_table()[facts[0]["group"]]["strategy"] == "STRICT_SPREAD"
    assert [fact["environment"]["LOCAL_RANK"] for fact in facts] == ["0", "0"]
    assert [fact["environment"]["LOCAL_WORLD_SIZE"] for fact in facts] == ["1", "1"]
    for rank, log in enumerate(theirs):
        assert not log.exists()
        assert f"printed by rank {rank}\n" in (tmp_path / "logs" / f"train-{rank}.log").read_text()


class _unseen:
    """In the place of the mark in the driver's directory: a file that nobody sees."""

    def __init__(self, directory):
        self.mark = directory / "nowhere"

    def __enter__(self):
        return self.mark

    def __exit__(self, *error):
        pass


def test_workers_with_other_versions_are_refused(cluster, worker, monkeypatch):
    monkeypatch.setattr(module, "versions", lambda: {**versions(), "torch": "1.0"})

    async def main():
        executor = RayExecutor(context=ExecutorContext({"train": Seats(1)}, timeout=60))
        try:
            await executor.launch("train", worker)
        finally:
            await executor.close()

    with pytest.raises(ConfigError, match=r"other versions than the driver(.|\n)*: torch [\d.]+, not 1\.0$"):
        asyncio.run(main())
