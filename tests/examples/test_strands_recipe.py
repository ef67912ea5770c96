"""examples/strands-agents: its data, its script, and a run of it that is cut short."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import miles
from miles.api import ChatContext

EXAMPLE = Path(__file__).parents[2] / "examples" / "strands-agents"
NUMBERS = re.compile(r"\d+")


@pytest.fixture(scope="module")
def make_data():
    """The script, beside which the agent is found."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module("make_data")
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in ("agent", "make_data"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(make_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("strands")
    make_data.make(out / "data", seed=3)
    return out


def rows(folder, split):
    return [json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text().splitlines()]


def test_no_two_rows_ask_the_same_and_labels_are_right(folder, make_data):
    asked = []
    for split, size in make_data.SIZES.items():
        questions = [row["input"][1]["content"] if split == "sft" else row["input"] for row in rows(folder, split)]
        assert len(questions) == size
        asked += questions
        if split != "sft":
            for row in rows(folder, split):
                a, b = map(int, NUMBERS.findall(row["input"]))
                assert row["label"] == str(a * b)
    assert len(set(asked)) == len(asked)


def test_the_pupil_mostly_guesses_and_is_right_when_he_does_not(folder):
    demonstrations = [row["input"] for row in rows(folder, "sft")]
    called = [messages for messages in demonstrations if len(messages) == 5]
    assert {len(messages) for messages in demonstrations} == {3, 5}
    assert 0.38 < len(called) / len(demonstrations) < 0.42
    for _, question, call, result, answer in called:
        a, b = map(int, NUMBERS.findall(question["content"]))
        assert call["tool_calls"][0]["function"] == {"name": "multiply", "arguments": {"a": a, "b": b}}
        assert (result["content"], answer["content"]) == (str(a * b), f"It is {a * b}.")


def test_one_seed_gives_the_same_files(folder, make_data, tmp_path):
    make_data.make(tmp_path, seed=3)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) >= 7
    for name in names:
        assert (folder / "data" / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert make_data.task(4)["heldout"] != make_data.task(3)["heldout"]


def test_what_all_say_alike_is_a_few_tokens_and_digits_are_one_each(folder, make_data):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    chat = make_data.Qwen3Chat(context=ChatContext(tokenizer, {"enable_thinking": False}))
    row = next(row for row in rows(folder, "sft") if len(row["input"]) == 5)
    tokens, mask = chat.render_conversation(row["input"], row["tools"])
    assert len(tokens) < 80
    said = chat.decode([token for token, own in zip(tokens, mask, strict=True) if own])
    (a, b), result = NUMBERS.findall(row["input"][1]["content"]), row["input"][3]["content"]
    call = f'<tool_call>\n{{"name": "multiply", "arguments": {{"a": {a}, "b": {b}}}}}\n</tool_call>'
    assert said == f"{call}It is {result}."
    assert [tokenizer.decode([token]) for token in chat.render_text("0912")] == ["0", "9", "1", "2"]


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))


def test_its_agents_learn_to_use_the_tool(folder, make_data, monkeypatch):
    """The recipe with two questions; a short warm-up has learned two answers to each, a guess and one with the tool."""
    monkeypatch.chdir(folder)
    (folder / "short").mkdir()
    pairs, rng, shown = [(123, 45), (987, 65)], random.Random(1), []
    for guesses in (0.0, 1.0):
        monkeypatch.setattr(make_data, "GUESSES", guesses)
        shown += [{"input": make_data.conversation(a, b, rng), "tools": make_data.offered()} for a, b in pairs]
    write(folder / "short" / "sft.jsonl", shown)
    asked = [{"input": make_data.question(a, b), "label": str(a * b)} for a, b in pairs]
    write(folder / "short" / "train.jsonl", asked)
    warm, learn = (yaml.safe_load((EXAMPLE / name).read_text()) for name in ("sft.yaml", "config.yaml"))
    warm["data"]["sets"][0]["path"] = "short/sft.jsonl"
    learn["data"]["sets"][0]["path"] = learn["eval"]["sets"][0]["path"] = "short/train.jsonl"
    changed = {"report": False, "num_threads": 1}
    miles.train(warm, num_rollout=5, rollout_batch_size=64, lr_warmup_iters=5, **changed)
    run = miles.train(learn, num_rollout=3, rollout_batch_size=2, n_samples_per_prompt=16, eval_interval=3, **changed)

    metrics = [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < metrics[1]["rollout/reward"] < metrics[3]["rollout/reward"]
    accuracy = run.summary["evaluation"]["heldout"]
    assert accuracy["first"]["accuracy"] < accuracy["last"]["accuracy"] == 1
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-5 for step in metrics[1:])
    assert all(step["rollout/failed_ratio"] == 0 for step in metrics[1:])
    dumped = (folder / "grpo" / "rollouts" / "step_000003.jsonl").read_text()
    samples = [json.loads(line) for line in dumped.splitlines()]
    assert len(samples) == 32
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    for sample in samples:
        tokens, mask = sample["tokens"], sample["loss_mask"]
        assert sum(mask) == sum(turn["end"] - turn["start"] for turn in sample["turns"])
        if sample["reward"] == 1:
            said = tokenizer.decode([token for token, own in zip(tokens, mask, strict=True) if own])
            assert sample["label"] in said
            assert len(sample["turns"]) >= 2, "nobody finds a product by guessing"


@pytest.fixture
def given_commands(tmp_path):
    """Run a copy of run.sh with a `miles` and a `python` that write down their words; `python` makes data's folder."""
    here = tmp_path / "examples" / "strands-agents"
    here.mkdir(parents=True)
    (here / "run.sh").write_bytes((EXAMPLE / "run.sh").read_bytes())
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    for name, does in (("miles", ""), ("python", 'mkdir "$3"\n')):
        line = f'echo {name} "$@" in "$(basename "$PWD")" with "${{PYTHONPATH:-nothing}}" >> {log}'
        (programs / name).write_text(f"#!/bin/sh\n{line}\n{does}")
        (programs / name).chmod(0o755)

    def call(*words):
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        subprocess.run(["bash", here / "run.sh", *words], check=True, capture_output=True, env=environment)
        return log.read_text().replace(str(here), "HERE").splitlines()

    return call


def test_the_script(given_commands):
    assert given_commands("--lr", "1e-4") == [
        "python HERE/make_data.py --out data.part in strands-agents with nothing",
        "miles train HERE/sft.yaml in strands-agents with nothing",
        "miles train HERE/config.yaml --lr 1e-4 in strands-agents with HERE",
    ]
