"""`miles ...` in this process, standing in a folder with a data file and a module."""

import sys

import pytest

from miles.cli import main

BASE = [
    "--hf-checkpoint",
    "org/tiny",
    "--num-rollout",
    "2",
    "--prompt-data",
    "train.jsonl",
    "--rm-type",
    "my_rewards:one",
]


@pytest.fixture
def miles(tmp_path, monkeypatch, capsys):
    """`miles("train", ...)` -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "train.jsonl").write_text('{"input": "1+1", "label": "2"}\n')
    (tmp_path / "my_rewards.py").write_text("def one(sample):\n    return 1.0\n")

    def miles(*argv):
        code = main([str(word) for word in argv])
        out = capsys.readouterr()
        return code, out.out, out.err

    yield miles
    sys.modules.pop("my_rewards", None)


@pytest.fixture
def base():
    """Arguments of a run that could start."""
    return list(BASE)
