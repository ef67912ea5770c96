"""One cluster for all tests: starting one takes seconds."""

import pytest


@pytest.fixture(scope="session")
def cluster():
    """Two nodes, emulated on this machine, which this process has joined: executors find it and leave it running."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    cluster.add_node(num_cpus=2, num_gpus=0)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
