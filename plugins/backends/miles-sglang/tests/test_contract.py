"""The engines keep the contract of their kind: `sglang_external` before `miles serve`, `sglang` where SGLang is."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from served import in_thread, served

from miles.config import Spec
from miles.testing import RolloutEngineContract
from miles.testing.contract import installed
from miles.toolkit import Shipment

CHECKPOINT = "miles.builtins.disk_sync:read"


@contextmanager
def miles_serve(context) -> Iterator[str]:
    """The torch engine behind HTTP, in a thread of its own: its address."""
    engine = installed().build("rollout_engines", Spec(name="torch"), context=context)
    with in_thread(served(engine, context)) as url:
        yield url


class TestExternal(RolloutEngineContract):
    name = "sglang_external"
    transport = "disk"
    bad_options = (
        {"urls": []},
        {"urls": ["localhost:1"], "timeout": 0},
        {"urls": ["localhost:1"], "retries": -1},
        {"urls": ["localhost:1"], "router_ip": "localhost"},
    )

    @pytest.fixture(autouse=True)
    def server(self, monkeypatch, tmp_path):
        with miles_serve(self.context()) as url:
            monkeypatch.setattr(type(self), "options", {"urls": [url]})
            self.folder = tmp_path
            yield

    async def send(self, engine, version, weights):
        """As the transport `disk` does: a checkpoint, and its name."""
        folder = self.folder / f"weight_v{version}"
        folder.mkdir()
        save_file(dict(weights), folder / "model.safetensors")
        await engine.receive("disk", version, Shipment(CHECKPOINT, {"folder": str(folder)}))


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None or not torch.cuda.is_available(), reason="needs SGLang and a GPU"
)
class TestSGLang(RolloutEngineContract):
    name = "sglang"
    patience = 600.0
    seeded = False
    bad_options = ({"tp_size": 0}, {"retries": -1}, {"port": 30000})
    options = {"mem_fraction_static": 0.2, "enable_memory_saver": True}

    def context(self):
        return replace(super().context(), device="cuda:0", sleeps=True)
