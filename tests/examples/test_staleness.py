"""examples/staleness: what the delayed sync hands over, and what the study asks for and says."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from miles.config.load import resolve
from miles.errors import WeightSyncError
from miles.plugins import load_plugins
from miles.testing.syncs import WeightSyncContract

FOLDER = Path(__file__).parents[2] / "examples" / "staleness"


def load(file, name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


delayed = load("delayed", "delayed")


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


# ----------------------------------------------------------------------------------------------------------- the study

study = load("study", "staleness_study")
Curve = study.Curve


@pytest.mark.parametrize("correction", study.corrections())
def test_flags_of_a_correction_are_accepted(correction):
    job = study.job(correction, lag=4, seed=1)
    resolve([FOLDER.parent / "quickstart" / "grpo.yaml"], job.flags, load_plugins())
    assert job.name == f"{correction}-lag4"
    assert job.modules == (FOLDER,)
    assert job.flags[job.flags.index("--num-rollout") + 1] == "64"


def test_accuracy_is_that_of_the_policy_that_the_engine_held():
    curve = Curve([0, 4, 8, 12], [0.0, 1.0, 2.0, 3.0], [0.1, 0.1, 0.2, 0.7], [0.1, 0.1, 0.1, 0.6])
    assert study.learned(curve, 4) == Curve([0, 4, 8], [1.0, 2.0, 3.0], [0.1, 0.2, 0.7], [0.1, 0.1, 0.6])
    assert study.learned(curve, 1).steps == [0, 3, 7, 11]
    assert study.learned(curve, 0) == curve


def test_the_table_is_age_by_correction():
    def ends(*values):
        return [Curve([0, 4], [0.0, 1.0], [0.1, value], [0.1, 0.1]) for value in values]

    found = {"none-lag0": ends(0.9, 1.0), "none-lag16": ends(0.4), "decoupled_ppo-lag16": ends(0.8)}
    lines = study.table(study.arranged(found)).splitlines()
    assert lines[:4] == [
        "| greedy, at the end | 0 updates old | 16 updates old |",
        "|---|---|---|",
        "| none | 0.950 (0.900 to 1.000) | 0.400 (0.400 to 0.400) |",
        "| decoupled_ppo |  | 0.800 (0.800 to 0.800) |",
    ]
    assert lines[7] == "| none | 0.100 (0.100 to 0.100) | 0.100 (0.100 to 0.100) |"  # sampled
    assert lines[12] == "| none | 0.525 (0.500 to 0.550) | 0.400 (0.400 to 0.400) |"  # (0.1 + 0.9) / 2, (0.1 + 1) / 2
    text, charts = study.shown(found)
    assert "updates old" in text
    assert charts["by_rollouts"].count("<polyline") == 3
