"""An engine that is lost in the middle of a run, a weight sync that fails: the run ends as an undisturbed one does."""

import asyncio
import sys
import types

import pytest
from miniature import assert_same_end, metrics

import miles
from miles.api import Component, EngineError, EngineLostError, WeightSyncError, hookimpl
from miles.builtins.torch_engine.engine import TorchEngine


class Fragile(TorchEngine):
    """Dies of its `dies_at`th request, with all that it is doing, or after its `leaves_at`th answer, and loses its
    weights. Spoils its `spoils`th sync."""

    dies_at, leaves_at, spoils = 0, 0, 0
    asked = answered = received = life = 0
    log: list = []

    async def generate(self, request):
        cls, life = type(self), self.life
        cls.asked += 1
        if cls.asked == cls.dies_at:
            self._die()
        try:
            result = await super().generate(request)
        except EngineError as error:
            if self._ended or life != self.life:
                raise EngineLostError(f"it died: {error}") from error
            raise
        cls.answered += 1
        if cls.answered == cls.leaves_at:
            self._die()
            await self.dying
        return result

    def _die(self):
        self.log.append("dies")
        self.life += 1
        self.dying = asyncio.ensure_future(self.close())

    async def health(self):
        if self._ended:
            raise EngineLostError("it died")
        return await super().health()

    async def restart(self):
        self.log.append("restarts")
        await self.dying
        await self.start()
        self.unusable = "it has no weights yet"

    async def receive(self, transport, version, payload):
        cls = type(self)
        cls.received += 1
        self.log.append(f"receives {version}")
        if cls.received == cls.spoils:
            await self._do(lambda: self._spoil(version))
            raise WeightSyncError("half of it did not come")
        await super().receive(transport, version, payload)

    def _spoil(self, version):
        self.unusable = f"it holds a mixture of version {version}"


class Plugin:
    __name__ = "fragile_plugin"

    @hookimpl
    def miles_register_rollout_engines(self):
        return {"fragile": Component("fragile:Fragile", provides=("responses",))}


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """Train with an engine that fails as it is told."""

    def train(name, dies_at=0, leaves_at=0, spoils=0, **rollout):
        told = {"dies_at": dies_at, "leaves_at": leaves_at, "spoils": spoils}
        engine = type("Fragile", (Fragile,), {**told, "log": []})
        monkeypatch.setitem(sys.modules, "fragile", types.SimpleNamespace(Fragile=engine))
        where = {"run": config["run"] | {"dir": str(tmp_path / name), "report": False}}
        settings = config | where | {"rollout": config["rollout"] | {"engine": "fragile"} | rollout}
        return miles.train(settings, plugins=[Plugin()]), engine.log

    return train


def test_an_engine_that_dies_in_the_middle_of_a_rollout(run, tmp_path):
    """Its requests are asked again, with their seeds; what it had cached is gone."""
    run("whole")
    _, log = run("lost", dies_at=30)
    assert log == ["receives 0", "receives 1", "dies", "restarts", "receives 1", "receives 2"]
    assert [line.get("rollout/engine/restarts") for line in metrics(tmp_path / "lost")] == [None, 0.0, 1.0]
    assert_same_end(tmp_path / "whole", tmp_path / "lost", but=("rollout/engine/", "rollout/cached_ratio"))


def test_an_engine_that_dies_after_its_last_answer(run, tmp_path):
    """Eight prompts of evaluation, and the sixteen samples of a batch: it is found before the trainer's turn."""
    run("whole")
    _, log = run("left", leaves_at=24)
    assert log == ["receives 0", "dies", "restarts", "receives 1", "receives 2"]
    assert_same_end(tmp_path / "whole", tmp_path / "left", but=("rollout/engine/", "rollout/cached_ratio"))


def test_a_weight_sync_that_fails_is_done_again(run, tmp_path):
    run("whole")
    _, log = run("spoilt", spoils=2)
    assert log == ["receives 0", "receives 1", "receives 1", "receives 2"]
    assert_same_end(tmp_path / "whole", tmp_path / "spoilt")


def test_an_engine_that_dies_too_often_is_an_error(run):
    with pytest.raises(EngineLostError, match="it died") as raised:
        run("often", dies_at=3, max_engine_restarts=0)
    assert "--max-engine-restarts" in raised.value.__notes__[0]
