"""The executor keeps the contract of its kind."""

import pytest

from miles.testing import ExecutorContract

pytest.importorskip("ray")


@pytest.mark.usefixtures("cluster")
class TestRay(ExecutorContract):
    name = "ray"
    sizes = (1, 2)
    bad_options = ({"cpus_per_worker": 0.0},)
