"""examples/staleness: what the delayed sync hands over, and what the study asks for and says."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from miles.errors import WeightSyncError
from miles.testing.syncs import WeightSyncContract

FOLDER = Path(__file__).parents[2] / "examples" / "staleness"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


delayed = load("delayed")


class TestDelayed(WeightSyncContract):
    """Without a lag it is a weight sync like any other."""

    name = "delayed:Delayed"
    skips = dict.fromkeys(
        (
            "test_its_plugin_says_which_api_it_was_made_for",
            "test_registering_is_light",
            "test_it_is_described",
            "test_the_target_is_imported_only_when_built",
        ),
        "it is named by its module: no plugin registers it",
    )


def lagging():
    """The contract's stage, with a lag of two updates."""
    stage = TestDelayed()
    stage.options = {"lag": 2}
    return stage


def test_the_engine_holds_and_reports_the_weights_of_two_updates_ago():
    async def work(sync, workers, engines):
        found = []
        for version in range(5):
            await workers.call("become", version % 2)
            metrics = await sync.push(version)
            assert metrics == {"weight_sync/version": max(0, version - 2), "weight_sync/lag": min(version, 2)}
            found.append((await engines[0].health()).weight_version)
            model = max(0, version - 2) % 2
            np.testing.assert_allclose(await engines[0].score([5, 17, 3, 200]), lagging().expected(model), atol=2e-4)
        assert found == [0, 0, 0, 1, 2]
        assert sorted(sync.kept) == [2, 3, 4]

    lagging().use(work)


def test_versions_that_are_not_in_memory_are_an_error():
    async def work(sync, workers, engines):
        with pytest.raises(WeightSyncError, match=r"version 3 is not in memory.*--resume never"):
            await sync.push(5)

    lagging().use(work)
