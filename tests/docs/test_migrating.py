"""docs/migrating.md: its tables are those that the sources give, its report, commands and functions are real."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miles.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_of_repository", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


migrating = load(ROOT / "scripts" / "migrating.py")
stand_in = load(ROOT / "examples" / "qwen3-0.6b-grpo" / "stand_in.py")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the page's commands are given: a tiny model and a few problems under the names that the page uses."""
    monkeypatch.chdir(tmp_path)
    stand_in.main(Path("made"))
    Path("models").mkdir()
    Path("made/model").rename("models/Qwen3-0.6B")
    Path("models/Qwen3-0.6B_torch_dist").mkdir()
    Path("data").mkdir()
    rows = "".join(json.dumps({"prompt": f"What is {i} + {i}?", "label": str(2 * i)}) + "\n" for i in range(8))
    Path("data/train.jsonl").write_text(rows)
    Path("data/aime.jsonl").write_text(rows)
    return tmp_path


def bash(script, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, env=environment)


def words_after():
    """The words of the page's command line, without `miles`."""
    return blocks("bash")[1].replace("\\\n", " ").split()[1:]


def test_the_tables_are_not_stale():
    assert migrating.page_with(migrating.tables(migrating.upstream_flags()), PAGE) == PAGE


def test_every_flag_of_upstream_stands_in_the_tables():
    listed = set(re.findall(r"`--([\w-]+)(?: [^`]*)?`", PAGE[PAGE.index(migrating.BEGIN) :]))
    assert {flag.name.partition("=")[0] for flag in migrating.upstream_flags()} <= listed


def test_a_launch_script_is_answered_as_the_page_says(folder):
    before = blocks("bash")[0].replace("python3 train.py", f"{sys.executable} {ROOT / 'train.py'}")
    ran = bash(before, folder)
    assert ran.returncode == 2
    assert ran.stderr == blocks("text")[0]


def test_the_rewritten_command_is_accepted(folder, capsys):
    assert main([*words_after(), "--dry-run"]) == 0
    assert "agreeing_rewards" in capsys.readouterr().out


def test_only_what_the_report_names_was_changed():
    """Flags that the first script has and the second has not are those the report and the text speak of."""
    before, after = (set(re.findall(r"(?<!\S)--[\w-]+", text)) for text in blocks("bash")[:2])
    spoken = set(re.findall(r"--[\w-]+", blocks("text")[0])) | {
        "--ref-load",
        "--save",
        "--dynamic-sampling-filter-path",
    }
    default = {"--actor-num-nodes", "--actor-num-gpus-per-node", "--rollout-num-gpus-per-engine"}
    default |= {"--context-parallel-size", "--balance-data"}
    assert before - after <= spoken | default


def test_the_page_s_functions_train(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    for code in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            Path(name[1]).write_text(code)
    small = """
        --num-rollout 1 --rollout-batch-size 2 --n-samples-per-prompt 2 --global-batch-size 4 --eval-interval none
        --rollout-max-response-len 6 --over-sampling-batch-size 2 --rollout-filters [] --eval-max-response-len 6
        --n-samples-per-eval-prompt 1 --tracking jsonl --num-threads 1 --device cpu --no-colocate --train-dtype fp32
        --rm-type my_rewards:reward --generate my_generate:generate
    """
    assert main([*words_after(), *small.split()]) == 0
    sample = json.loads(next(iter(Path("runs/math/rollouts").glob("step_*1.jsonl"))).read_text().splitlines()[0])
    assert sample["reward_parts"]["my_rewards:reward/brief"] == 1.0
    assert sum(sample["loss_mask"]) == len(sample["tokens"]) - sample["prompt_length"] > 0
    last = Path("runs/math/metrics.jsonl").read_text().splitlines()[-1]
    assert "rollout/reward_parts/my_rewards:reward/brief" in json.loads(last)
    assert "rollout/reward_parts/my_rewards:reward/brief" in PAGE
    assert json.loads(Path("runs/math/summary.json").read_text())["status"] == "completed"


def test_the_old_reward_and_the_new_one_agree():
    """On a sample that answers right at length: upstream's by its own object, ours by ours."""
    import asyncio
    from types import SimpleNamespace

    old, new = {}, {}
    for scope, code in zip((old, new), blocks("python")[:2], strict=True):
        exec(code, scope)
    theirs = SimpleNamespace(response="Answer: 4", label="4")
    ours = SimpleNamespace(text="Answer: 4", response_length=200, prompt=SimpleNamespace(label="4"))
    assert asyncio.run(old["reward"](None, theirs)) == new["reward"](ours)["reward"] == 1.0


@pytest.mark.parametrize(("flags", "mode"), [("", "one_step_off"), ("--fully-async", "fully_async")])
def test_asynchronous_training_is_a_mode(flags, mode, folder):
    words = [word for word in words_after()[1:] if word != "--colocate"]
    ran = bash(f"{sys.executable} {ROOT / 'train_async.py'} {' '.join(words)} --no-colocate --dry-run {flags}", folder)
    assert ran.returncode == 0, ran.stderr
    assert f"busy: {mode}" in ran.stdout
