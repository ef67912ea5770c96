"""Weights arrive as they were sent, in whole groups, while the next are made ready; and failures end the walk."""

import asyncio
import base64
import inspect
import io
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from miles_sglang.weights import DEVICE, by_uuid, hand_over, handle_of
from torch.multiprocessing import reductions

from miles.api import WeightSyncError
from miles.buckets import pack

GROUPS = [
    {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.bfloat16)},
    {"odd": torch.randint(0, 255, (13,), dtype=torch.uint8), "half": torch.randn(5).half()},
    {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "mask": torch.tensor([True, False, True])},
    {"fp8": torch.randn(3, 7).to(torch.float8_e4m3fn), "scale": torch.randn(1, dtype=torch.float64)},
    {"turned": torch.randn(4, 6, dtype=torch.bfloat16).T, "int": torch.tensor([1 << 40])},
]
"""Sizes and types that leave whatever follows at every kind of offset."""

ONE = [["cpu"]]
"""A server of one rank."""
ALLOWED = (
    "builtins.", "collections.", "copyreg.", "functools.", "types.", "torch.",
    "multiprocessing.resource_sharer.", "multiprocessing.reduction.",
)  # fmt: skip
"""Of what a server (0.5.17) unpickles, what is wanted here."""


class ServersUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        assert f"{module}.".startswith(ALLOWED), f"a server would refuse {module}.{name}"
        return super().find_class(module, name)


def loaded(handle):
    """Name -> tensor, in order, cut out of a bucket as a server does it; and the bucket."""
    said = ServersUnpickler(io.BytesIO(base64.b64decode(handle, validate=True))).load()
    bytes_ = said["flattened_tensor"]
    found = {
        about.name: bytes_[about.start_idx : about.end_idx].view(about.dtype).reshape(about.shape)
        for about in said["metadata"]
    }
    return found, bytes_


class Server:
    """Loads what it is handed after a moment, and says so in `events`, which it shares with who sends."""

    def __init__(self, events, fails_at=None):
        self.events, self.fails_at = events, fails_at
        self.weights, self.buckets, self.sizes = {}, [], []

    async def post(self, handles):
        number = len(self.buckets)
        self.events.append(f"load {number}")
        found, bytes_ = loaded(handles[0][0])
        self.buckets.append(list(found))
        self.sizes.append(len(bytes_))
        await asyncio.sleep(0.05)
        if number == self.fails_at:
            raise RuntimeError("the server is unwell")
        self.weights |= {name: tensor.clone() for name, tensor in found.items()}  # late: its bucket must still hold it
        self.events.append(f"loaded {number}")


def stream(groups, events, fails_at=None):
    try:
        for number, group in enumerate(groups):
            if number == fails_at:
                raise RuntimeError("the trainer is unwell")
            events.append(f"group {number}")
            yield group
    finally:
        events.append("closed")


def sent(groups, limit, **failures):
    """What a server holds after a sync, and what happened in which order."""
    events = []
    server = Server(events, failures.get("server"))
    asyncio.run(hand_over(stream(groups, events, failures.get("trainer")), server.post, homes=ONE, limit=limit))
    return server, events


@pytest.mark.parametrize("limit", [1, 100, 150, 10_000])
def test_every_bit_arrives(limit):
    server, events = sent(GROUPS, limit)
    wanted = {name: tensor for group in GROUPS for name, tensor in group.items()}
    assert list(server.weights) == list(wanted)
    for name, tensor in wanted.items():
        there = server.weights[name]
        assert (there.dtype, there.shape) == (tensor.dtype, tensor.shape), name
        assert there.contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
    assert events[-1] == f"loaded {len(server.buckets) - 1}"
    assert "closed" in events


def test_groups_stay_whole_and_share_a_bucket_where_they_fit():
    # Bytes, each tensor padded to 16: 64 + 16, 16 + 16, 16 + 0 + 16, 32 + 16, 48 + 16.
    assert sent(GROUPS, 112)[0].buckets == [["a", "b", "odd", "half"], ["scalar", "none", "mask", "fp8", "scale"],
                                            ["turned", "int"]]  # fmt: skip
    assert sent(GROUPS, 1)[0].buckets == [list(group) for group in GROUPS]
    assert sent(GROUPS, 112)[0].sizes == [80 + 32, 32 + 48, 64]


def test_the_next_bucket_is_made_while_one_is_loaded_and_none_is_overwritten():
    groups = [{str(number): torch.full((4,), float(number))} for number in range(6)]
    server, events = sent(groups, 16)
    at = {event: place for place, event in enumerate(events)}
    for number in range(4):  # group n + 2 is drawn to see that bucket n + 1 is full
        assert at[f"load {number}"] < at[f"group {number + 2}"] < at[f"loaded {number}"] < at[f"load {number + 1}"]
    assert [tensor.tolist() for tensor in server.weights.values()] == [[float(n)] * 4 for n in range(6)]
    assert len(server.buckets) == 6


def test_every_rank_of_every_server_gets_a_handle_of_a_bucket_on_its_own_device():
    """torch takes `cpu:0` for another device than `cpu`."""
    seen, memory = [], []

    async def post(handles):
        seen.extend(handles)
        for handle in (one for server in handles for one in server):
            found, bytes_ = loaded(handle)
            assert found["w"].tolist() == [1.0, 2.0]
            memory.append(bytes_)
        for bytes_ in memory:  # what one reads is changed where another reads the same
            bytes_.add_(1)

    homes = [["cpu", "cpu:0"], ["cpu:0", "cpu:0"]]
    asyncio.run(hand_over([{"w": torch.tensor([1.0, 2.0])}], post, homes=homes, limit=64))
    assert [len(server) for server in seen] == [2, 2]
    start = int(torch.tensor([1.0]).view(torch.uint8)[3])
    assert [int(bytes_[3]) - start for bytes_ in memory] == [1, 3, 3, 3]


def test_another_process_reads_the_memory_itself():
    """By a file in shared memory: on a CPU, that is what a handle names."""
    code = """
import base64, pickle, sys, torch
said = pickle.loads(base64.b64decode(sys.stdin.readline()))
place = said["metadata"][1]
tensor = said["flattened_tensor"][place.start_idx : place.end_idx].view(place.dtype).reshape(place.shape)
print(place.name, tensor.tolist(), flush=True)
said["flattened_tensor"].zero_()
"""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        (bucket,) = pack([{"x": torch.tensor([7], dtype=torch.uint8), "y": torch.tensor([[1.5], [2.5]]).half()}], 64)
        answer = subprocess.run([sys.executable, "-c", code], input=handle_of(bucket), capture_output=True, text=True)
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    assert answer.stdout == "y [[1.5], [2.5]]\n", answer.stderr
    assert not bucket.bytes.any()


# ------------------------------------------------------------------------------------------------------------ failures


def failing(groups, **failures):
    events = []
    server = Server(events, failures.get("server"))
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(hand_over(stream(groups, events, failures.get("trainer")), server.post, homes=ONE, limit=16))
    return str(caught.value), events, server


SIX = [{str(number): torch.full((4,), float(number))} for number in range(6)]


def test_a_server_that_fails_ends_the_walk():
    said, events, server = failing(SIX, server=1)
    assert said == "the server is unwell"
    assert events[-1] == "closed"
    assert "group 4" not in events
    assert len(server.buckets) == 2


def test_a_trainer_that_fails_is_told_when_the_server_has_let_go_of_the_bucket_before():
    said, events, server = failing(SIX, trainer=3)
    assert said == "the trainer is unwell"
    assert events[-3:] == ["load 1", "closed", "loaded 1"]
    assert list(server.weights) == ["0", "1"]


def test_a_server_that_fails_as_well_does_not_hide_why_the_trainer_did():
    said, events, _ = failing(SIX, trainer=3, server=1)
    assert said == "the trainer is unwell"
    assert events[-1] == "closed"


def test_a_sync_that_is_broken_off_waits_for_the_server_and_closes():
    events = []
    server = Server(events)

    async def story():
        task = asyncio.create_task(hand_over(stream(SIX, events), server.post, homes=ONE, limit=16))
        while "load 0" not in events:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    assert events[-2:] == ["loaded 0", "closed"]


def test_a_sync_without_weights_is_refused():
    async def post(handles):
        raise AssertionError("nothing is to be posted")

    with pytest.raises(WeightSyncError, match="brought no weights"):
        asyncio.run(hand_over([], post, homes=ONE))


# ----------------------------------------------------------------------------------------------------------------- GPUs


def test_a_gpu_is_named_by_its_uuid(monkeypatch):
    """Servers and trainers may see other GPUs under other numbers. torch's own order of arguments is relied on."""
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[DEVICE] == "storage_device"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device}"))
    assert by_uuid((*range(DEVICE), 3, "handle", 8)) == (*range(DEVICE), "GPU-3", "handle", 8)
    assert by_uuid((*range(DEVICE), "GPU-9", "handle", 8))[DEVICE] == "GPU-9"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_handle_of_gpu_memory_names_it_by_uuid():
    (bucket,) = pack([{"x": torch.arange(5, device="cpu")}], 64, "cuda")
    said = base64.b64decode(handle_of(bucket))
    assert str(torch.cuda.get_device_properties(0).uuid).encode() in said
