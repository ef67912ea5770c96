"""examples/search-r1: its data, its script, and a run of it that is cut short."""

import asyncio
import importlib.util
import json
import os
import subprocess
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from miles_search_r1.embedding import Embedding
from miles_search_r1.index import Building, build_index
from miles_search_r1.notation import is_valid
from miles_search_r1.server import listening, make_app
from transformers import AutoTokenizer

import miles
from miles.testing import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "search-r1"
TIS = {"is/weight_mean", "is/weight_max"}


@pytest.fixture(scope="module")
def make_data():
    spec = importlib.util.spec_from_file_location("search_r1_make_data", EXAMPLE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def folder(make_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("search-r1")
    make_data.make(out / "data", seed=3)
    return out


@pytest.fixture(scope="module")
def index(folder):
    return build_index(folder / "data" / "corpus.jsonl", folder / "index", Embedding("wordllama"), Building())


def rows(folder, split):
    return lines_of(folder / "data" / f"{split}.jsonl")


def inn_of(row):
    return row["prompt"][-1]["content"].rpartition("the inn ")[2].removesuffix("?")


def test_answers_stand_in_the_corpus_and_nowhere_else(folder, make_data):
    towns = {}
    for passage in rows(folder, "corpus"):
        name, _, text = passage["contents"].partition("\n")
        towns[name] = text.removeprefix(f"The inn {name} is in ").removesuffix(".")
    assert len(towns) == 32 * 40
    asked = {split: [inn_of(row) for row in rows(folder, split)] for split in ("train", "heldout")}
    for split, names in asked.items():
        assert len(names) == make_data.SIZES[split]
        for row, name in zip(rows(folder, split), names, strict=True):
            assert row["reward_model"]["ground_truth"]["target"] == [towns[name]]
            assert towns[name] not in json.dumps(row["prompt"])
    assert len({*asked["train"], *asked["heldout"]}) == sum(map(len, asked.values()))
    shown = (folder / "data" / "sft.jsonl").read_text()
    questions = [line for line in shown.splitlines() if any(f"the inn {name}?" in line for name in asked["heldout"])]
    assert questions == []
    most = max(list(towns.values()).count(town) for town in set(towns.values()))
    assert most / len(towns) < 0.05, "a guess must not pay"


def test_a_search_finds_the_passage(folder, index):
    names = [inn_of(row) for row in rows(folder, "heldout")]
    found = index.search([f"inn {name}" for name in names], 3)
    assert all(name in hits[0][1]["contents"] for name, hits in zip(names, found, strict=True))


def test_the_pupil_mostly_guesses_and_is_right_when_he_does_not(folder, make_data):
    demonstrations = rows(folder, "sft")
    guesses = [row for row in demonstrations if "remember" in row["label"]]
    searches = [row for row in demonstrations if "<search>" in row["label"]]
    answers = [row for row in demonstrations if "It says so" in row["label"]]
    assert len(guesses) + len(searches) + len(answers) == len(demonstrations) >= make_data.DEMONSTRATIONS
    assert 0.57 < len(guesses) / (len(guesses) + len(searches)) < 0.63
    for row in answers[:200]:
        assert is_valid(row["input"].rpartition("assistant\n")[2] + row["label"])
        said = row["label"].partition("<answer> ")[2].partition(" ")[0]
        assert f"is in {said}." in row["input"].partition("Doc 2")[0]


def test_words_are_one_token_each(folder, make_data):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "model")
    for word in f"{make_data.FIRST} {make_data.SECOND} {make_data.TOWNS}".split():
        assert len(tokenizer.encode(f" {word}")) == 1, word
    assert all(len(tokenizer.encode(tag)) == 1 for tag in make_data.TAGS)


def test_one_seed_gives_the_same_files(folder, make_data, tmp_path):
    make_data.make(tmp_path, seed=3)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) >= 8
    for name in names:
        assert (folder / "data" / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.fixture
def url(index):
    """A retrieval server in a thread."""
    loop, ready, stopped, address = asyncio.new_event_loop(), threading.Event(), asyncio.Event(), []

    async def serve():
        async with listening(make_app(index), "127.0.0.1", 0) as where:
            address.append(f"{where}/retrieve")
            ready.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield address[0]
    loop.call_soon_threadsafe(stopped.set)
    thread.join(30)
    loop.close()


@pytest.mark.slow
def test_it_learns_to_search(folder, make_data, url, monkeypatch):
    """The recipe with four inns; a short warm-up has learned two beginnings for each, a guess and a search."""
    monkeypatch.chdir(folder)
    (folder / "short").mkdir()
    tasks, shown = rows(folder, "train")[:4], rows(folder, "sft")
    tokenizer = AutoTokenizer.from_pretrained("data/model")
    everything = make_data.inns(make_data.random.Random(3))
    named = {inn.name: inn for inn in everything}
    asked, rng = [named[inn_of(row)] for row in tasks], make_data.random.Random(1)
    monkeypatch.setattr(make_data, "DEMONSTRATIONS", 60)
    shown = make_data.demonstrations(asked, everything, tokenizer, rng)
    make_data.write_jsonl(folder / "short" / "sft.jsonl", shown)
    make_data.write_jsonl(folder / "short" / "train.jsonl", tasks)
    warm, learn = (yaml.safe_load((EXAMPLE / name).read_text()) for name in ("sft.yaml", "config.yaml"))
    warm["data"]["sets"][0]["path"] = "short/sft.jsonl"
    for task_set in (learn["data"]["sets"][0], learn["eval"]["sets"][0]):
        task_set["path"] = "short/train.jsonl"
        task_set["environment"]["url"] = url
    changed = {"report": False, "num_threads": 1}
    miles.train(warm, num_rollout=6, rollout_batch_size=64, lr_warmup_iters=5, **changed)
    changed |= {"num_rollout": 6, "eval_interval": 6, "rollout_batch_size": 4, "n_samples_per_prompt": 16, "lr": 4e-4}
    run = miles.train(learn, **changed)

    metrics = lines_of(folder / "grpo" / "metrics.jsonl")
    assert metrics[1]["rollout/reward"] < metrics[6]["rollout/reward"]
    accuracy = run.summary["evaluation"]["heldout"]
    assert accuracy["first"]["reward"] < accuracy["last"]["reward"]
    for step in metrics[1:]:
        assert step["train/train_rollout_logprob_abs_diff"] < 1e-5
        assert step["rollout/failed_ratio"] == 0
    samples = [sample for path in (folder / "grpo" / "rollouts").glob("step_*.jsonl") for sample in lines_of(path)]
    searched = [sample for sample in samples if "<information>" in sample["response"]]
    assert searched
    for sample in searched:
        said = [token for token, own in zip(sample["tokens"], sample["loss_mask"], strict=True) if own]
        assert "<information>" not in tokenizer.decode(said)
        assert len(sample["turns"]) >= 2


@pytest.mark.slow
def test_the_recipe_for_a_real_model_on_a_stand_in(folder, make_data, url, tmp_path, monkeypatch):
    """Its file as it is, but for a model that knows nothing, parquet files in the form of NQ's, and the sizes."""
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path / "model", tiny.hf_config("qwen3", max_position_embeddings=2048))
    recipe = yaml.safe_load((EXAMPLE / "qwen2.5-3b.yaml").read_text())
    recipe["model"]["hf_checkpoint"] = "model"
    recipe["optimizer"]["lr"] = 1e-3
    for task_set in (recipe["data"]["sets"][0], recipe["eval"]["sets"][0]):
        path = Path(task_set["path"].partition("@")[0])
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(folder, "train")[:4]), path)
        task_set["environment"]["url"] = url
        task_set["sampling"]["max_new_tokens"] = 8
    changed = {"num_rollout": 2, "rollout_batch_size": 2, "n_samples_per_prompt": 2, "global_batch_size": 4}
    changed |= {"eval_interval": 2, "train_dtype": "fp32", "chat_format": "template", "device": "cpu", "report": False}
    run = miles.train(recipe, num_threads=1, **changed)
    assert run.summary["status"] == "completed"
    assert all(set(step) >= TIS for step in lines_of(run.directory / "metrics.jsonl")[1:])
    samples = [sample for path in (run.directory / "rollouts").glob("*.jsonl") for sample in lines_of(path)]
    assert len(samples) == 2 * 2 * 2
    for sample in samples:
        assert sample["label"]["ground_truth"]["target"][0] in make_data.TOWNS
        assert (sample["status"], sample["reward"]) == ("truncated", 0.0)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_script(tmp_path):
    """Which commands it gives, by a `miles` and a `python` that only write down their words; data that were cut short
    are made again."""
    here, programs, log = tmp_path / "examples" / "search-r1", tmp_path / "bin", tmp_path / "log"
    here.mkdir(parents=True)
    programs.mkdir()
    (here / "run.sh").write_bytes((EXAMPLE / "run.sh").read_bytes())
    serve = 'if [ "$2" = serve ]; then echo 4 passages; exec sleep 60; fi\n'
    made = f'mkdir -p "$3/model"; [ ! -e {tmp_path}/killed ]\n'
    for name, does in (("miles", serve), ("python", made)):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" in "$(basename "$PWD")" >> {log}\n{does}')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PORT": "9000"}
    command = ["bash", here / "run.sh", "--lr", "1e-4"]
    (tmp_path / "killed").touch()
    assert subprocess.run(command, capture_output=True, env=environment, timeout=30).returncode != 0
    (tmp_path / "killed").unlink()
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=30)
    given = log.read_text().replace(str(here), "HERE").splitlines()
    makes = "python HERE/make_data.py --out data.part in search-r1"
    assert given.count(makes) == 2
    assert given[:6] == [
        makes,
        makes,
        "miles search index data/corpus.jsonl --out index --model wordllama in search-r1",
        "miles train HERE/sft.yaml in search-r1",
        "miles search serve index --port 9000 in search-r1",
        "miles train HERE/config.yaml --search-r1-url http://127.0.0.1:9000/retrieve --lr 1e-4 in search-r1",
    ]
