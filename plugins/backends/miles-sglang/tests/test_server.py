"""A server process comes up or says why not, and never outlives whoever started it. `programs/sglang` stands for
SGLang."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
from miles_sglang.ports import HOST, Port
from miles_sglang.server import ServerProcess, environment

from miles.api import EngineError


@pytest.fixture(autouse=True)
def sglang(stand_ins, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(stand_ins))


@pytest.fixture
def pids(tmp_path):
    """Of a server and its child, once it has written them down; whoever is left ends with the test."""

    def read():
        return [int(pid) for pid in path.read_text().split()]

    path = tmp_path / "pids"
    yield read
    if path.exists():
        for pid in read():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def server(folder, **arguments):
    options = {"timeout": 60.0} | {name: arguments.pop(name) for name in ("timeout", "grace") if name in arguments}
    return ServerProcess(arguments, folder / "logs" / "sglang-0.log", name="server sglang-0", **options)


def runs(pid):
    """Whether a process is there and is no zombie that nobody has asked for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def all_gone(pids, seconds=5.0):
    last = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < last:
        time.sleep(0.02)
    return not any(map(runs, pids))


async def status(url):
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as reply:
        return reply.status


def test_a_server_answers_until_it_is_stopped(tmp_path, pids, monkeypatch):
    monkeypatch.setenv("RANK", "3")

    async def story():
        one = server(tmp_path, pids=str(tmp_path / "pids"), model_path="models/a b", disable_cuda_graph=True)
        assert one.death() == "server sglang-0 was not started"
        await one.start()
        assert one.death() == ""
        assert await status(one.url) == 200
        assert all(map(runs, pids()))
        await one.stop()
        assert all_gone(pids())
        assert one.death() == "server sglang-0 was stopped"
        await one.stop()
        one.close()

    asyncio.run(story())
    first, environment = (tmp_path / "logs" / "sglang-0.log").read_text().splitlines()[:2]
    assert first.startswith("# 20")
    assert "-m sglang.launch_server --pids" in first
    assert "--model-path 'models/a b' --disable-cuda-graph --host 127.0.0.1 --port" in first
    assert environment == "environment: NCCL_NVLS_ENABLE"


def test_one_that_ends_at_once_is_an_error_with_the_end_of_its_log(tmp_path):
    one = server(tmp_path, behave="die")
    with pytest.raises(EngineError) as caught:
        asyncio.run(one.start())
    said = str(caught.value)
    assert said.startswith(
        f"server sglang-0 ended with exit code 3; the last lines of {tmp_path}/logs/sglang-0.log:\n    line 11\n"
    )
    assert said.endswith("    line 29\n    out of memory\nThat was before it was healthy.")
    assert len(said.splitlines()) == 22


def test_it_is_noticed_where_children_that_end_are_nobody_s_business(tmp_path):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(EngineError, match=r"server sglang-0 ended with exit code \d+;(.|\n)*out of memory"):
            asyncio.run(server(tmp_path, behave="die").start())
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_one_that_never_answers_is_given_up_and_ended(tmp_path, pids):
    one = server(tmp_path, behave="hang", timeout=5.0, pids=str(tmp_path / "pids"))
    with pytest.raises(EngineError, match=r"was not healthy within 5 s; the last lines of .*sglang-0\.log:\n    # 20"):
        asyncio.run(one.start())
    assert all_gone(pids())


def test_one_that_does_not_heed_sigterm_is_killed(tmp_path, pids):
    async def story():
        one = server(tmp_path, behave="stubborn", grace=0.2, pids=str(tmp_path / "pids"))
        await one.start()
        await one.stop()

    asyncio.run(story())
    assert all_gone(pids())


def test_a_death_is_told_and_takes_the_children_with_it_and_a_restart_answers_where_it_did(tmp_path, pids):
    async def story():
        one = server(tmp_path, pids=str(tmp_path / "pids"))
        await one.start()
        first = pids()
        os.kill(first[0], signal.SIGKILL)
        while not one.death():
            await asyncio.sleep(0.02)
        assert one.death().startswith("server sglang-0 ended with signal SIGKILL; the last lines of")
        assert all_gone(first)
        await one.start()
        assert await status(one.url) == 200
        assert pids()[0] != first[0]
        await one.stop()

    asyncio.run(story())
    log = (tmp_path / "logs" / "sglang-0.log").read_text()
    assert log.count("-m sglang.launch_server") == 2


OWNER = """
import asyncio, sys
from pathlib import Path
from miles_sglang.server import ServerProcess

async def main():
    folder = Path(sys.argv[1])
    arguments = {"pids": str(folder / "pids"), "behave": sys.argv[2]}
    one = ServerProcess(arguments, folder / "log", timeout=60.0, grace=0.3)
    await one.start()
    print("healthy", flush=True)
    await asyncio.sleep(99)

asyncio.run(main())
"""


@pytest.mark.parametrize("behave", ["well", "stubborn"])
def test_a_server_ends_when_its_owner_is_killed(tmp_path, pids, behave):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path), behave], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"healthy\n"
    assert all(map(runs, pids()))
    owner.kill()
    owner.wait()
    assert all_gone(pids())
    owner.stdout.close()


def test_a_missing_sglang_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr("miles_sglang.server.installed", lambda package: False)
    with pytest.raises(EngineError, match=r'pip install "miles-sglang\[server\]"'):
        server(tmp_path)


def test_a_reserved_port_takes_a_listener_and_is_given_to_nobody_else():
    ports = [Port() for _ in range(50)]
    numbers = {port.number for port in ports}
    assert len(numbers) == 50
    for _ in range(300):
        with socket.socket() as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asking.bind((HOST, 0))
            assert asking.getsockname()[1] not in numbers
    with socket.create_server((HOST, ports[0].number)), socket.create_connection((HOST, ports[0].number)):
        pass
    with socket.socket() as rude, pytest.raises(OSError, match="in use"):
        rude.bind((HOST, ports[1].number))
    for port in ports:
        port.close()


def test_what_a_server_finds_in_its_environment():
    ours = {
        "CUDA_VISIBLE_DEVICES": "2,3", "NCCL_NVLS_ENABLE": "1", "RANK": "1", "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    kept = {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "NCCL_NVLS_ENABLE": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
    }
    assert environment(ours, sleeps=True) == {**kept, "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1"}
    assert environment(ours, sleeps=False) == {**kept, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
