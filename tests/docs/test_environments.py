"""docs/environments.md: its files work, and what it shows is what they say."""

import json
import re
import runpy
from pathlib import Path

import pytest

import miles
from miles.testing import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_shop_is_played_as_shown(folder, capsys):
    runpy.run_path("play.py")
    assert capsys.readouterr().out == PAGE.partition("$ python play.py\n")[2].partition("```")[0]


def test_the_calculators_run(folder):
    """With a model that knows nothing, in place of Qwen/Qwen3-0.6B: what it says is no call, and so an answer."""
    tiny.checkpoint(folder / "model", tiny.hf_config("qwen3", max_position_embeddings=4096))
    changed = {"num_rollout": 1, "hf_checkpoint": str(folder / "model"), "chat_format": "template", "device": "cpu"}
    run = miles.train("tools.yaml", rollout_max_response_len=4, n_samples_per_prompt=2, **changed)
    assert run.summary["status"] == "completed"
    [rows] = [path.read_text() for path in (folder / "runs" / "tools" / "rollouts").glob("*.jsonl")]
    samples = [json.loads(line) for line in rows.splitlines()]
    assert len(samples) == 2 * 2
    for sample in samples:
        assert "Quotient of two numbers." in tiny.tokenizer().decode(sample["tokens"][: sample["prompt_length"]])
        assert sample["reward"] == 0.0
