"""docs/environments.md: its files work, and what it shows is what they say."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import miles
from miles import cli
from miles.testing import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_shop_is_played_as_shown(folder, capsys):
    runpy.run_path("play.py")
    assert capsys.readouterr().out == PAGE.partition("$ python play.py\n")[2].partition("```")[0]


def without_numbers(text, folder="/home/me"):
    """What differs from machine to machine is left out."""
    text = re.sub(r"[\d.,]+ (m?s|episodes/s)\b", r"N \1", text.replace(str(folder), "/home/me"))
    return re.sub(r"at once \d calls?", "at once N calls", text)


def test_the_game_is_sixty_lines_and_checked_as_shown(folder, capsys):
    assert len(FILES["cave.py"].splitlines()) <= 60
    command, _, shown = PAGE.partition("$ miles env check ")[2].partition("```")[0].partition("\n")
    code = cli.main(["env", "check", *command.split()])
    out = without_numbers(capsys.readouterr().out, folder)
    assert code == 0
    begins, ends = without_numbers(shown).split("  ...\n")
    assert out.startswith(begins)
    assert out.endswith(ends)


def test_a_fault_is_shown_as_on_the_page(folder, capsys):
    spoilt = FILES["cave.py"].replace(
        'return StepResult((self.say("That is no way."),), reward=-0.1)', 'raise ValueError(f"not a way: {way!r}")'
    )
    (folder / "cave.py").write_text(spoilt)
    assert cli.main(["env", "check", "cave:Cave", "--no-contract"]) == 1
    shown = re.search(r"^    FAULT environment Cave.*\n +(.*); the action was", PAGE, flags=re.MULTILINE)
    out = capsys.readouterr().out
    assert re.search(r"FAULT environment Cave \(.*cave.py:16\): ValueError: not a way: '.*' \(.*cave.py:26\)", out)
    assert f"      {shown[1]}; the action was > " in out


def trained(folder, config, **changed):
    """A run of a file of the page with a model that knows nothing in place of Qwen/Qwen3-0.6B: its samples."""
    tiny.checkpoint(folder / "model", tiny.hf_config("qwen3", max_position_embeddings=4096))
    changed |= {"num_rollout": 1, "hf_checkpoint": str(folder / "model"), "chat_format": "template", "device": "cpu"}
    run = miles.train(config, rollout_max_response_len=4, n_samples_per_prompt=2, **changed)
    assert run.summary["status"] == "completed"
    [rows] = [path.read_text() for path in (folder / "runs" / config[:-5] / "rollouts").glob("*.jsonl")]
    return [json.loads(line) for line in rows.splitlines()]


def test_the_game_is_trained_on(folder):
    samples = trained(folder, "cave.yaml", environment_calls=1)
    assert len(samples) == 4 * 2
    for sample in samples:
        assert "Water is" in tiny.tokenizer().decode(sample["tokens"][: sample["prompt_length"]])
        assert -0.8 <= sample["reward"] <= 1.0
    lines = (folder / "runs" / "cave" / "metrics.jsonl").read_text().splitlines()
    metrics = {name: value for line in lines for name, value in json.loads(line).items()}
    assert metrics["perf/environment/caves/calls_max"] == 1
    assert metrics["rollout/environment/caves/errors"] == 0
    assert metrics["rollout/environment/caves/calls"] >= 2 * len(samples)


@pytest.mark.slow
def test_the_game_is_learned(folder):
    """The commands of the page, and a fifth of its steps."""
    shown = {int(step): float(acc) for step, acc in re.findall(r"^    step (\d+)/60 .* acc (\S+)", PAGE, re.MULTILINE)}
    runpy.run_path("walks.py")
    changed = {"report": False, "num_threads": 1, "device": "cpu"}
    miles.train("walks.yaml", **changed)
    command = re.search(r"^    miles train (cave.yaml --hf.*\n.*)$", PAGE, re.MULTILINE)[1].replace("\\\n", " ")
    flags = [*command.split(), "--num-rollout", "12", "--num-threads", "1", "--device", "cpu"]
    assert cli.main(["train", *flags]) == 0
    lines = (folder / "runs" / "cave" / "metrics.jsonl").read_text().splitlines()
    accuracy = [found for line in lines if (found := json.loads(line).get("rollout/accuracy")) is not None]
    assert len(accuracy) == 12
    assert accuracy[0] == pytest.approx(shown[1], abs=0.05)
    assert accuracy[4] == pytest.approx(shown[5], abs=0.15)
    assert min(accuracy[8:]) > 3 * accuracy[0]


def test_the_calculators_run(folder):
    """What it says is no call, and so an answer."""
    samples = trained(folder, "tools.yaml")
    assert len(samples) == 2 * 2
    for sample in samples:
        assert "Quotient of two numbers." in tiny.tokenizer().decode(sample["tokens"][: sample["prompt_length"]])
        assert sample["reward"] == 0.0
