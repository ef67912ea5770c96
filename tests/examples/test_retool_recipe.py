"""examples/retool: its data, its script, its recipe for a real model, and a run of it that is cut short."""

import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from miles_retool.environment import Retool
from miles_retool.plugin import RetoolOptions
from transformers import AutoTokenizer

import miles
from miles.api import ChatContext

EXAMPLE = Path(__file__).parents[2] / "examples" / "retool"
NUMBERS = re.compile(r"\d+")
BY_HAND = {
    "times": lambda a, b: a * b,
    "divisor": math.gcd,
    "digits": lambda a, b: sum(int(digit) for digit in f"{a**b}"),
    "modulo": lambda a, b, m: a**b % m,
}


@pytest.fixture(scope="module")
def make_data():
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module("make_data")
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("make_data", None)


@pytest.fixture(scope="module")
def folder(make_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("retool")
    make_data.make(out / "data", seed=3)
    return out


def rows(folder, split):
    return [json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text().splitlines()]


def expected(question):
    kind = next(word for word in BY_HAND if word in question)
    return str(BY_HAND[kind](*map(int, NUMBERS.findall(question))))


def test_no_two_rows_ask_the_same_and_labels_are_right(folder, make_data):
    asked = []
    for split, size in make_data.SIZES.items():
        given = rows(folder, split)
        assert len(given) == size
        asked += [row["input"][1]["content"] for row in given]
        if split != "sft":
            assert [row["label"] for row in given] == [expected(row["input"][1]["content"]) for row in given]
    assert len(set(asked)) == len(asked)
    assert all(sum(word in question for question in asked) > len(asked) / 5 for word in BY_HAND)


def test_the_pupil_mostly_guesses_and_his_programs_say_what_he_read(folder, capsys):
    demonstrations = [row["input"] for row in rows(folder, "sft")]
    called = [messages for messages in demonstrations if len(messages) == 5]
    assert {len(messages) for messages in demonstrations} == {3, 5}
    assert 0.38 < len(called) / len(demonstrations) < 0.42
    for _, question, call, result, answer in called[:200]:
        function = call["tool_calls"][0]["function"]
        assert function["name"] == "code_interpreter"
        exec(function["arguments"]["code"], {})
        assert result["content"] == f"Output:\n{capsys.readouterr().out.strip()}"
        assert answer["content"] == f"Answer: \\boxed{{{expected(question['content'])}}}"


def test_one_seed_gives_the_same_files(folder, make_data, tmp_path):
    make_data.make(tmp_path, seed=3)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) >= 7
    for name in names:
        assert (folder / "data" / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert make_data.task(4)["heldout"] != make_data.task(3)["heldout"]


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))


def test_it_learns_to_use_the_interpreter(folder, make_data, monkeypatch):
    """The recipe with two questions; a short warm-up has learned two answers to each, a guess and one by program."""
    monkeypatch.chdir(folder)
    (folder / "short").mkdir()
    questions, rng, shown = [("product", 123, 45), ("digits", 987, 65)], random.Random(1), []
    for guesses in (0.0, 1.0):
        monkeypatch.setattr(make_data, "GUESSES", guesses)
        shown += [{"input": make_data.conversation(*q, rng), "tools": make_data.offered()} for q in questions]
    write(folder / "short" / "sft.jsonl", shown)
    asked = [{"input": make_data.asked(*q), "label": str(make_data.answer(*q))} for q in questions]
    write(folder / "short" / "train.jsonl", asked)
    warm, learn = (yaml.safe_load((EXAMPLE / name).read_text()) for name in ("sft.yaml", "config.yaml"))
    warm["data"]["sets"][0]["path"] = "short/sft.jsonl"
    for task_set in (learn["data"]["sets"][0], learn["eval"]["sets"][0]):
        task_set["path"] = "short/train.jsonl"
        task_set["environment"]["require"] = []  # the programs are ours
    changed = {"report": False, "num_threads": 1}
    miles.train(warm, num_rollout=5, rollout_batch_size=64, lr_warmup_iters=5, **changed)
    run = miles.train(learn, num_rollout=3, rollout_batch_size=2, n_samples_per_prompt=16, eval_interval=3, **changed)

    metrics = [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["rollout/accuracy"] < metrics[3]["rollout/accuracy"]
    accuracy = run.summary["evaluation"]["heldout"]
    assert accuracy["first"]["accuracy"] < accuracy["last"]["accuracy"] == 1
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-5 for step in metrics[1:])
    assert all(step["rollout/failed_ratio"] == 0 for step in metrics[1:])
    dumped = (folder / "grpo" / "rollouts" / "step_000003.jsonl").read_text()
    samples = [json.loads(line) for line in dumped.splitlines()]
    assert len(samples) == 32
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    right = []
    for sample in samples:
        tokens, mask = sample["tokens"], sample["loss_mask"]
        assert sum(mask) == sum(turn["end"] - turn["start"] for turn in sample["turns"])
        said = tokenizer.decode([token for token, own in zip(tokens, mask, strict=True) if own])
        programs = sample["reward_parts"]["retool/programs"]
        assert programs <= said.count("<tool_call>")  # not every call can be read
        assert "Output:" not in said, "what a program said is not trained on"
        if sample["reward"] == 1:
            assert sample["label"] in said
            right.append(programs)
        else:
            assert sample["reward"] == pytest.approx(-1 + 0.05 * programs)
    assert sum(programs >= 1 for programs in right) > 0.8 * len(right) > 10  # of two answers one is soon known by heart


def test_the_same_in_text(folder, make_data, monkeypatch):
    """A model that was shown programs between tags writes them, and what they print is put into its turn."""
    monkeypatch.chdir(folder)
    (folder / "text").mkdir()
    said = "<code>\nprint(6 * 7)\n</code>\n\n<interpreter>\nOutput:\n42\n</interpreter>\n\nAnswer: \\boxed{42}"
    asked = [make_data.SYSTEM, {"role": "user", "content": "What is 6 times 7?"}]
    write(folder / "text" / "sft.jsonl", [{"input": [*asked, {"role": "assistant", "content": said}]}])
    write(folder / "text" / "train.jsonl", [{"input": asked, "label": "42"}])
    warm, learn = (yaml.safe_load((EXAMPLE / name).read_text()) for name in ("sft.yaml", "config.yaml"))
    warm["run"]["dir"], warm["data"]["sets"][0]["path"] = "text/sft", "text/sft.jsonl"
    learn["run"]["dir"], learn["model"]["hf_checkpoint"] = "text/grpo", "text/sft/hf"
    del learn["eval"]
    environment = {"name": "retool", "protocol": "text", "require": []}
    learn["data"]["sets"][0] |= {"path": "text/train.jsonl", "environment": environment}
    changed = {"report": False, "num_threads": 1}
    miles.train(warm, num_rollout=5, rollout_batch_size=64, lr_warmup_iters=5, **changed)
    miles.train(learn, num_rollout=1, rollout_batch_size=1, n_samples_per_prompt=8, **changed)

    samples = (folder / "text" / "grpo" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    ran = [sample for sample in map(json.loads, samples) if sample["reward_parts"]["retool/programs"] == 1]
    assert len(ran) > 4
    assert any(sample["reward"] == 1 for sample in ran)
    for sample in ran:
        tokens, mask = sample["tokens"], sample["loss_mask"]
        first, second = ((turn["start"], turn["end"]) for turn in sample["turns"][:2])
        assert tokenizer.decode(tokens[slice(*first)]).endswith("print(6 * 7)\n</code>")
        shown = tokenizer.decode(tokens[first[1] : second[0]])
        assert shown == "\n\n<interpreter>\nOutput:\n42\n</interpreter>\n\n"
        assert sum(mask) == sum(turn["end"] - turn["start"] for turn in sample["turns"])


def test_the_tool_is_shown_as_in_the_demonstrations(folder, make_data):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    chat = make_data.Qwen3Chat(context=ChatContext(tokenizer, {"enable_thinking": False}))
    row = rows(folder, "sft")[0]
    prompt = chat.decode(chat.render_prompt(row["input"][:2], row["tools"]))
    assert chat.decode(chat.render_conversation(row["input"], row["tools"])[0]).startswith(prompt)
    assert Retool(RetoolOptions(require=())).tools()[0].__name__ in prompt


def test_the_recipe_for_a_real_model_is_sound():
    """Everything but the files that it names, which are not here."""
    command = [sys.executable, "-m", "miles", "train", str(EXAMPLE / "qwen3-4b.yaml"), "--dry-run"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "3 problems in the configuration" in said, said
    assert said.count("no such file") + said.count("no checkpoint folder") == 3
    recipe = yaml.safe_load((EXAMPLE / "qwen3-4b.yaml").read_text())
    assert recipe["rollout"]["batch_size"] * recipe["rollout"]["n_samples_per_prompt"] == 256
    for task_set in (*recipe["data"]["sets"], *recipe["eval"]["sets"]):
        RetoolOptions(**{key: value for key, value in task_set["environment"].items() if key != "name"})


@pytest.fixture
def given_commands(tmp_path):
    """Run a copy of run.sh with a `miles` and a `python` that only write down their words."""
    here = tmp_path / "examples" / "retool"
    here.mkdir(parents=True)
    (here / "run.sh").write_bytes((EXAMPLE / "run.sh").read_bytes())
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    made = f'mkdir -p "$3/model"; [ ! -e {tmp_path}/killed ]\n'
    for name, does in (("miles", ""), ("python", made)):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" in "$(basename "$PWD")" >> {log}\n{does}')
        (programs / name).chmod(0o755)

    def call(*words):
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        killed = tmp_path / "killed"
        subprocess.run(
            ["bash", here / "run.sh", *words], check=not killed.exists(), capture_output=True, env=environment
        )
        return log.read_text().replace(str(here), "HERE").splitlines()

    return call


def test_the_script(given_commands, tmp_path):
    """Data that were cut short are made again, whole ones are not."""
    makes = "python HERE/make_data.py --out data.part in retool"
    (tmp_path / "killed").touch()
    assert given_commands() == [makes]
    (tmp_path / "killed").unlink()
    first = given_commands("--lr", "1e-4")
    assert given_commands("--lr", "1e-4")[len(first) :] == first[2:]
    assert first == [
        makes,
        makes,
        "miles train HERE/sft.yaml in retool",
        "miles train HERE/config.yaml --lr 1e-4 in retool",
    ]
