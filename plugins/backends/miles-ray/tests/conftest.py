"""One cluster for all tests: starting one takes seconds."""

import asyncio

import pytest

WORKER = """
import asyncio, logging, os, sys
import numpy as np
import torch


class Worker:
    def __init__(self, rank, size):
        self.rank, self.seen, self.state = rank, [], "new"

    def facts(self):
        import ray

        group = ray.util.get_current_placement_group()
        context = ray.get_runtime_context()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
        names += ("NCCL_NVLS_ENABLE", "NCCL_DEBUG", "OMP_NUM_THREADS")
        return {
            "pid": os.getpid(),
            "group": group.id.hex(),
            "node": context.get_node_id(),
            "directory": os.getcwd(),
            "environment": {name: os.environ.get(name) for name in names},
        }

    def sum_over_ranks(self, value):
        torch.distributed.init_process_group("gloo")
        tensor = torch.tensor([float(value)])
        torch.distributed.all_reduce(tensor)
        torch.distributed.destroy_process_group()
        return tensor.item()

    def note(self, name, array=None):
        self.seen.append(name)
        return list(self.seen)

    def double(self, array):
        array *= 2
        return array

    def speak(self):
        print("printed by rank", self.rank, flush=True)
        os.system("echo from a program that it started")
        logging.getLogger("miles").info("rank %d is well", self.rank)
        logging.getLogger("miles").warning("rank %d is worried", self.rank)

    async def wait(self):
        try:
            self.state = "waiting"
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            self.state = "given up"
            raise

    def look(self):
        return self.state

    def leave(self):
        sys.exit(3)

    def lament_and_die(self):
        print("the last that was heard of it", flush=True)
        os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="session")
def cluster():
    """Two nodes, emulated on this machine, which this process has joined: executors find it and leave it running. Ray
    believes that one of them has two GPUs."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
    cluster.add_node(num_cpus=2, num_gpus=0)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    """Target of a worker in a module of the user's, which nothing but `sys.path` of the driver finds."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "ray_project.py").write_text(WORKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield "ray_project:Worker"


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner
