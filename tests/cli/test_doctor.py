"""`miles doctor`, and `miles plugins doctor`, on sound and on broken machines."""

import copy
import json
import os
import shutil
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest

from miles.config.components import components_of
from miles.config.load import resolve
from miles.diagnosis import accelerator, installed, probe, report
from miles.kinds import KINDS
from miles.plugins import load_plugins

KEYS = {"schema", "miles", "sections", "verdicts", "exit_code"}
FINDING_KEYS = {"name", "mark", "found", "remedy", "stops", "facts"}


@pytest.fixture(scope="session")
def real_facts():
    return probe.gather()


@pytest.fixture
def doctor(miles, real_facts, monkeypatch):
    """`doctor(*words)` -> (exit code, report as JSON), on this machine but for `doctor.facts`."""
    facts = copy.deepcopy(real_facts)
    monkeypatch.setattr(probe, "gather", lambda blocked: facts)
    monkeypatch.setattr(accelerator, "cards", list)

    def doctor(*words):
        code, out, err = miles("doctor", "--json", *words)
        assert err == ""
        return code, json.loads(out)

    doctor.facts = facts
    return doctor


def verdict(seen, what):
    (found,) = [v for v in seen["verdicts"] if v["what"] == what]
    return found


def finding(seen, section, name):
    (section,) = [s for s in seen["sections"] if s["name"] == section]
    return next(f for f in section["findings"] if f["name"] == name)


def test_this_machine_is_sound_and_told_so_quickly(miles, monkeypatch):
    monkeypatch.setattr(accelerator, "cards", list)
    before = sum(os.times()[:4])
    code, out, err = miles("doctor")
    seconds = sum(os.times()[:4]) - before
    assert (code, err) == (0, "")
    assert "  yes     train on CPU" in out
    assert "  no      train backend megatron: no installed plugin offers it (that would be miles-megatron)" in out
    assert max(map(len, out.splitlines())) <= 120
    assert seconds < 15  # of the processor, with those of the processes that it starts: others use it, too


def test_the_json_has_the_shape_it_promises(doctor):
    code, seen = doctor()
    assert code == seen["exit_code"] == 0
    assert seen.keys() == KEYS
    assert seen["schema"] == 1
    for section in seen["sections"]:
        assert section.keys() == {"name", "findings"}
        for one in section["findings"]:
            assert one.keys() == FINDING_KEYS
            assert one["mark"] in ("ok", "info", "warn", "missing", "fault")
    assert all(v.keys() == {"what", "can", "why", "how"} for v in seen["verdicts"])
    assert all(v["can"] == (v["why"] == "") for v in seen["verdicts"])


def test_it_says_how_far_training_reaches(doctor):
    """As far as the installed executors start ranks."""
    _, seen = doctor("-p", "no:ray")
    how = "on this machine, in one process or several: an executor for several machines is miles-ray"
    assert verdict(seen, "train backend fsdp")["how"] == how
    assert verdict(seen, "train backend megatron")["how"] == ""


def test_no_torch(doctor):
    error = {"error": "ModuleNotFoundError: No module named 'torch'"}
    doctor.facts |= {"torch": error, "compute": error}
    for one in doctor.facts["components"]["components"]:
        if one["name"] == "torch":
            one["faults"] = ["cannot import miles.builtins.torch_engine.engine: " + error["error"]]
    code, seen = doctor()
    assert code == 1
    assert "No module named 'torch'" in verdict(seen, "train on CPU")["why"]
    assert not verdict(seen, "rollout engine torch")["can"]
    assert verdict(seen, "rollout engine none")["can"]
    assert verdict(seen, "train on CPU")["why"].count("No module named") == 1  # said once is enough
    assert "pip install" in finding(seen, "accelerator", "torch")["remedy"]


def test_a_transformers_of_the_wrong_version(doctor, monkeypatch):
    monkeypatch.setattr(installed, "version", lambda name: "4.57.1" if name == "transformers" else version(name))
    code, seen = doctor()
    assert code == 1
    assert verdict(seen, "train on CPU")["why"] == ("transformers: 4.57.1 is outside <5.18,>=5.12, which miles needs")
    assert finding(seen, "packages", "transformers")["remedy"] == "pip install 'transformers<5.18,>=5.12'"


def test_a_transformers_that_is_broken(doctor):
    doctor.facts["transformers"] = {"error": "ImportError: cannot import name 'is_flax_available'"}
    code, seen = doctor()
    assert code == 1
    assert "is_flax_available" in verdict(seen, "train on CPU")["why"]


def test_a_plugin_that_does_not_load(doctor, tmp_path, monkeypatch):
    info = tmp_path / "site" / "miles_ill-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: miles-ill\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[miles]\nill = no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(info.parent))
    code, seen = doctor()
    assert code == 1
    why = verdict(seen, "train on CPU")["why"]
    assert "plugin 'ill' of miles-ill 0.3 (no_such_module_at_all) could not be loaded" in why
    code, seen = doctor("-p", "no:ill")
    assert code == 0
    assert finding(seen, "plugins", "ill")["found"] == "left out"


def test_a_component_that_cannot_be_imported_matters_where_it_is_used(doctor):
    components = {(one["kind"], one["name"]): one for one in doctor.facts["components"]["components"]}
    components["trackers", "wandb"]["faults"] = ["cannot import miles_wandb.tracker: ..."]
    code, seen = doctor()
    assert code == 0
    broken = finding(seen, "components", components["trackers", "wandb"]["title"])
    assert (broken["mark"], broken["facts"]) == ("fault", {"components": [["trackers", "wandb"]]})
    components["rewards", "exact_match"]["faults"] = ["cannot import miles_math: ImportError: no math"]
    code, seen = doctor()
    assert code == 1
    why = "cannot be imported: ImportError: no math"
    assert verdict(seen, "train on CPU")["why"] == f"{components['rewards', 'exact_match']['title']}: {why}"


def test_one_broken_library_is_one_line(doctor):
    ones = doctor.facts["components"]["components"]
    for one in (ones[0], ones[1], ones[2], ones[3]):
        one["faults"] = [f"cannot import {one['name']}.thing: ImportError: no blas"]
    _, seen = doctor()
    found = finding(seen, "components", f"{ones[0]['title']}, {ones[1]['title']} and 2 more")
    assert found["found"] == "cannot be imported: ImportError: no blas"
    assert len(found["facts"]["components"]) == 4


def test_a_full_disk(doctor, monkeypatch):
    full = namedtuple("Usage", "total used free")(100 << 30, 100 << 30, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code, seen = doctor()
    assert code == 1
    assert "full" in verdict(seen, "train on CPU")["why"]


def test_a_gpu_and_a_torch_for_the_cpu(doctor, monkeypatch):
    card = accelerator.Card("NVIDIA H100", "81559", "81000", "570.86", "9.0")
    monkeypatch.setattr(accelerator, "cards", lambda: [card])
    doctor.facts["torch"] |= {"version": "2.13.0+cpu", "cuda_build": None, "cuda_available": False, "devices": []}
    code, seen = doctor()
    assert code == 0  # the quickstart needs no GPU
    expected = "nvidia-smi sees 1 (NVIDIA H100), but torch 2.13.0+cpu is built for the CPU alone"
    assert verdict(seen, "train on GPU")["why"] == f"gpu: {expected}"


def test_a_check_that_crashes_is_a_line_of_the_report(doctor, monkeypatch):
    monkeypatch.setattr("miles.diagnosis.machine.memory", lambda: 1 / 0)
    code, seen = doctor()
    assert code == 0
    assert "this check crashed: ZeroDivisionError" in finding(seen, "machine", "memory")["found"]
    assert finding(seen, "machine", "cpu")["mark"] in ("ok", "warn")


def test_what_the_quickstart_is_made_of_is_what_is_asked_for():
    folder = Path(__file__).parents[2] / "examples" / "quickstart"
    used = set()
    for name in ("sft.yaml", "grpo.yaml"):
        config = resolve([folder / name], (), load_plugins(), purpose="show").config
        used |= {(use.kind, use.name) for use in components_of(config)}
    used = {(kind, name) for kind, name in used if name not in KINDS[kind].words}
    chosen = {kind for kind, _ in report.QUICKSTART - used}
    assert used <= report.QUICKSTART
    assert chosen <= {"bridges", "chat_formats", "generate_functions", "executors", "weight_syncs"}  # what `auto` finds


def test_words_that_it_does_not_take(miles):
    code, _, err = miles("doctor", "--jsn")
    assert code == 2
    assert "miles doctor does not take '--jsn'" in err
    assert "usage: miles doctor" in miles("doctor", "--help")[1]


def test_the_doctor_of_plugins(miles, monkeypatch):
    monkeypatch.setattr("miles.cli.plugins.diagnose", lambda plugins: ["one is ill"])
    code, out, _ = miles("plugins", "doctor")
    assert code == 2
    assert "FAULT one is ill" in out
    monkeypatch.setattr("miles.cli.plugins.diagnose", lambda plugins: [])
    code, out, _ = miles("plugins", "doctor")
    assert code == 0
    assert "all is well" in out
