"""Versions in and out of their ranges, and parts that are there or not."""

from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement

from miles.diagnosis import installed


@pytest.fixture
def versions(monkeypatch):
    """Only these distributions are installed, in these versions."""

    def versions(**those):
        def version(name):
            if name not in those:
                raise PackageNotFoundError(name)
            return those[name]

        monkeypatch.setattr(installed, "version", version)

    return versions


@pytest.mark.parametrize(
    ("here", "mark", "words"),
    [
        ("5.13.0", "ok", "5.13.0 (<5.18,>=5.12)"),
        ("4.57.1", "fault", "4.57.1 is outside <5.18,>=5.12, which miles needs"),
        (None, "missing", "not installed; miles needs <5.18,>=5.12"),
    ],
)
def test_a_requirement(versions, here, mark, words):
    versions(**({"transformers": here} if here else {}))
    found = installed.judged(Requirement("transformers>=5.12,<5.18"), "miles", ("training",))
    assert (found.mark, found.found) == (mark, words)
    assert found.stops == (() if mark == "ok" else ("training",))
    assert found.remedy == ("" if mark == "ok" else "pip install 'transformers<5.18,>=5.12'")


def test_what_miles_itself_needs_is_there():
    marks = {finding.name: finding.mark for finding in installed.packages()}
    assert {"python", "miles", "torch", "transformers", "pluggy", "pydantic", "safetensors"} <= marks.keys()
    assert set(marks.values()) == {"ok"}
    assert "datasets" not in marks  # of an extra


def test_a_plugin_that_lacks_something(monkeypatch):
    monkeypatch.setattr(
        installed, "requires", lambda name: ["miles", "wandb<0.1"] if name == "miles-wandb" else ["miles"]
    )
    (found,) = installed.plugin_packages()
    assert found.found.endswith("is outside <0.1, which miles-wandb needs")
    assert found.stops == ()


def test_a_miles_that_is_not_installed(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    for name in ("metadata", "requires", "version"):
        monkeypatch.setattr(installed, name, absent)
    (found,) = installed.packages()
    assert (found.mark, found.stops) == ("fault", ("training",))
    assert "is not installed: no plugin can be found" in found.found
    assert {finding.mark for finding in installed.optional_parts(set()) if finding.name != "chromium"} == {"missing"}


def test_parts_are_of_use_when_something_installed_uses_them(versions):
    versions(sglang="0.5.17", datasets="5.0")
    parts = {finding.name: finding for finding in installed.optional_parts(set())}
    assert parts["datasets"].mark == "ok"
    assert parts["sglang"].found.endswith("no installed plugin offers rollout engine 'sglang'")
    assert parts["sglang"].mark == "info"
    assert parts["ray"].facts["usable"] is False
    assert parts["ray"].remedy == ""
    parts = {finding.name: finding for finding in installed.optional_parts({("executors", "ray")})}
    assert parts["ray"].remedy == "pip install miles-ray"


def test_components_that_wrap_what_is_not_there(versions):
    versions(ray="2.60")
    missing = installed.unserved()
    assert missing["rollout_engines", "sglang"] == "sglang is not installed: pip install 'miles-sglang[server]'"
    assert missing["train_backends", "megatron"].startswith("megatron-core is not installed")
    assert ("executors", "ray") not in missing
    versions(**{"transformer-engine": "2"})
    assert ("train_backends", "megatron") not in installed.unserved()
