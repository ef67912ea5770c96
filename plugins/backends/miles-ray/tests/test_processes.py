"""What is left of a cluster that a driver has started: nothing, however the driver ends."""

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("ray")

from miles_ray.cluster import join  # noqa: E402
from miles_ray.plugin import RayOptions  # noqa: E402

from miles.api import ConfigError  # noqa: E402

DRIVER = """
import asyncio, signal
from miles.api import ExecutorContext, Seats
from miles_ray.executor import RayExecutor

def on_terminate(number, frame):
    pass

async def main():
    signal.signal(signal.SIGTERM, on_terminate)
    executor = RayExecutor(context=ExecutorContext({"train": Seats(2)}))
    try:
        group = await executor.launch("train", "miles.testing.executors:Worker")
        print(signal.getsignal(signal.SIGTERM) is on_terminate, flush=True)
        await group.call("sleep", 1000)
    finally:
        await executor.close()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_takes_the_cluster_it_started_with_it(ending):
    """SIGINT goes to the whole process group, as Ctrl-C in a terminal does. SIGTERM, which a run answers by stopping at
    a safe place, leaves it the workers that it needs for that."""
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env={**environment, "MILES_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout.readline() == "True\n", "Ray has taken the driver's SIGTERM"
    names = _marked(mark)
    assert [sum(part in name for name in names) for part in ("/raylet ", "/gcs_server ", "ray::Actor")] == [1, 1, 2]
    os.killpg(driver.pid, signal.SIGTERM)
    time.sleep(1)
    assert sum("ray::Actor" in name for name in _marked(mark)) == 2
    (os.kill if ending == signal.SIGKILL else os.killpg)(driver.pid, ending)
    deadline = time.monotonic() + 30
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    said = driver.communicate()[1]
    assert left == []
    assert ("KeyboardInterrupt" in said) == (ending == signal.SIGINT)


def _marked(mark):
    """Command lines of the processes that have the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MILES_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:  # gone, or somebody else's
            continue
    return found


def test_the_entrance_of_clients_is_refused(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="ray cannot use ray://head:10001: .* --ray-address HOST:6379"):
        join("ray://head:10001", log_to_driver=False)
    with pytest.raises(ConfigError, match="way in for clients"):
        RayOptions("ray://head:10001").preflight()  # which a dry run calls
