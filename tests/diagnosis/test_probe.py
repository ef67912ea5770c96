"""The process that imports everything, and what is made of its death."""

import textwrap

import pytest

from miles.diagnosis import probe


@pytest.fixture
def with_torch(tmp_path, monkeypatch):
    """Put a torch of one's own before the real one, in this folder alone."""

    def with_torch(source):
        (tmp_path / "torch.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(tmp_path))

    return with_torch


def test_the_real_one():
    facts = probe.gather()
    import torch
    import transformers

    assert facts["torch"]["version"] == torch.__version__
    assert facts["transformers"]["version"] == transformers.__version__
    products = {(p["device"], p["dtype"]): p["relative_error"] for p in facts["compute"]["products"]}
    assert 0 < products["cpu", "float32"] < 1e-4 < products["cpu", "bfloat16"] < 2e-2
    names = {(one["kind"], one["name"]) for one in facts["components"]["components"]}
    assert {("rollout_engines", "torch"), ("policy_losses", "ppo_clip"), ("presets", "sft")} <= names


def test_a_torch_that_cannot_be_imported(with_torch):
    with_torch("raise ImportError('libcudart.so.12: cannot open shared object file')")
    facts = probe.gather()
    assert facts["torch"] == {"error": "ImportError: libcudart.so.12: cannot open shared object file"}
    assert "libcudart" in facts["compute"]["error"]
    broken = [one for one in facts["components"]["components"] if one["name"] == "fsdp"]
    assert "libcudart" in broken[0]["faults"][0]


def test_a_torch_that_leaves(with_torch):
    with_torch("import sys; sys.exit('no licence')")
    assert probe.gather()["torch"] == {"error": "SystemExit: no licence"}


def test_a_torch_that_kills_the_process(with_torch):
    with_torch("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    facts = probe.gather()
    assert facts["torch"] == {"error": "ended the process with SIGILL"}
    assert facts["transformers"] == {"error": "not reached: torch ended the process with SIGILL"}


def test_a_torch_that_hangs(with_torch):
    with_torch("import time; time.sleep(60)")
    facts = probe.gather(seconds=1.5)
    assert facts["torch"] == {"error": "hung: no answer within 1.5 seconds"}
    assert facts["components"]["error"].startswith("not reached: torch hung")
