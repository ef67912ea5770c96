"""docs/data.md: every row it shows is read by the real reader, every error it shows is the real one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from miles.api import LOSS_MASK, ROLLOUT_LOG_PROBS, WEIGHT_VERSION, DataContext, DataError, Prompt, Sample, Turn
from miles.builtins.files import FileSource
from miles.cli import main
from miles.config import Keys, TaskSet
from miles.config.load import resolve
from miles.data.readers import open_rows
from miles.report.dump import sample_record

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", re.M)
BLOCKS = FENCE.findall(PAGE)
ERRORS = [(about, text) for language, about, text in BLOCKS if language == "text" and not about.startswith("--")]
BROKEN = ("broken.jsonl", "numbers.jsonl")


def code_with(word):
    return next(text for language, _, text in BLOCKS if language == "python" and word in text)


class Chat:
    """A token for each character, roles and tools included."""

    def render_text(self, text):
        return [ord(c) for c in text]

    def render_prompt(self, messages, tools=None):
        return self.render_text("|".join(f"{m['role']}:{m['content']}" for m in messages) + str(tools or ""))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The page's files, where its commands are given."""
    monkeypatch.chdir(tmp_path)
    for language, name, text in BLOCKS:
        if language == "jsonl":
            Path(name).write_text(text)
    exec(code_with("parquet"))
    return tmp_path


def read(task_set, limit=None):
    return FileSource(context=DataContext([task_set], Chat(), 1, limit, False)).every_prompt()


@pytest.mark.parametrize("name", [name for language, name, _ in BLOCKS if language == "jsonl" and name not in BROKEN])
def test_every_file_is_read(name):
    keys = Keys(input="question", label="answer") if name == "problems.jsonl" else Keys()
    world = "maze" if name == "mazes.jsonl" else None
    prompts = read(TaskSet(name="set", path=name, keys=keys, environment=world))
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert [prompt.id for prompt in prompts] == [f"set:{i}" for i in range(len(rows))]
    for prompt, row in zip(prompts, rows, strict=True):
        asked = row.get("input", row.get("question"))
        assert (prompt.messages or prompt.text) == asked or (asked is None and prompt.messages == [])
        assert prompt.label == row.get("label", row.get("answer"))
        assert prompt.metadata == row.get("metadata", {})
        assert prompt.tools == row.get("tools")
        ends = isinstance(asked, list) and asked[-1]["role"] == "assistant"
        assert bool(prompt.tokens) is not (ends or asked is None)


def test_text_is_taken_as_it_is_unless_a_template_is_asked_for():
    plain = read(TaskSet(path="sums.jsonl"))[0]
    templated = read(TaskSet(path="sums.jsonl", apply_chat_template=True))[0]
    assert plain.tokens == [ord(c) for c in "12 + 7 ="]
    assert templated.messages == [{"role": "user", "content": "12 + 7 ="}]


def test_the_config_is_complete_but_for_the_model(plugins_of_page):
    config = yaml.safe_load(next(text for language, _, text in BLOCKS if language == "yaml"))
    flags = ["--hf-checkpoint", "org/tiny", "--num-rollout", "1"]
    solved = resolve([config], flags, plugins_of_page).config
    source = FileSource(context=DataContext(solved.data.sets, Chat(), 1, 512, solved.data.shuffle))
    drawn = [prompt.task_set for prompt in source.next_prompts(40)]
    assert {name: drawn.count(name) for name in set(drawn)} == {"sums": 10, "problems": 20, "chat": 10}
    [doubles] = solved.eval.sets
    assert [prompt.label for prompt in read(doubles)] == [str(2 * i) for i in range(50)]
    assert doubles.sampling.temperature == 0


@pytest.fixture(scope="module")
def plugins_of_page():
    from miles.plugins import load_plugins

    return load_plugins()


@pytest.mark.parametrize(("suffix", "rows"), re.findall(r"^\| `sums\.jsonl(@\[[^`]*)` \| ([^|]+) \|$", PAGE, re.M))
def test_slices(suffix, rows):
    Path("many.jsonl").write_text("".join(f'{{"input": "{i}"}}\n' for i in range(700)))
    meant = {
        "the first 500": range(500), "the rest": range(500, 700), "all but the last 100": range(600),
    }[rows]  # fmt: skip
    assert list(open_rows(f"many.jsonl{suffix}").numbers) == list(meant)


def error_of(about):
    """What the command line prints of the error of reading a file, with keys and limits as `name=value`."""
    name, *settings = about.split()
    given = dict(setting.split("=") for setting in settings)
    limit = int(given.pop("max_prompt_len", 0)) or None
    keys = Keys(**{{"label_key": "label", "image_key": "images"}[key]: value for key, value in given.items()})
    with pytest.raises(DataError) as caught:
        FileSource(context=DataContext([TaskSet(path=name, keys=keys)], Chat(), 1, limit, False)).next_prompts(1)
    notes = "".join(f"\n  {note}" for note in getattr(caught.value, "__notes__", ()))
    return f"miles: {caught.value}{notes}\n"


@pytest.mark.parametrize(("about", "text"), ERRORS)
def test_errors_are_those_that_are_shown(about, text):
    assert text == error_of(about)


def test_a_missing_file_is_found_by_a_dry_run(capsys):
    words = next(about for language, about, _ in BLOCKS if language == "text" and about.startswith("--"))
    shown = next(text for language, about, text in BLOCKS if about == words)
    flags = ["--hf-checkpoint", "org/tiny", "--rm-type", "exact_match", "--num-rollout", "1"]
    assert main(["train", *words.split(), *flags, "--dry-run"]) == 2
    assert capsys.readouterr().err.replace(str(Path.cwd()), "/home/me") == shown


def test_skipping_leaves_malformed_rows_out_and_counts_them():
    source = FileSource(context=DataContext([TaskSet(path="broken.jsonl")], Chat(), 1, None, False, bad_lines="skip"))
    assert [prompt.text for prompt in source.every_prompt()] == ["12 + 7 ="]
    assert source.counts == {"too_long": 0, "bad_rows": 1}


def test_the_fields_of_a_dumped_sample(capsys):
    table = PAGE[PAGE.index("| field | what it is |") :].split("\n\n")[0]
    fields = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", cell)}
    sample = Sample.begin(Prompt("sums:0", "sums", text="12 + 7 =", tokens=[1, 2]), id=3, group_id=1)
    sample.append([4, 5], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-0.1234567, -0.5], WEIGHT_VERSION: 2})
    sample.turns.append(Turn(2, 4, "stop"))
    sample.metadata["environment"] = {"tool_errors": 1}
    record = sample_record(sample, {"advantages": np.array([0, 0, 1.0, 1.0]), "loss": 0.5})
    assert set(record) == fields
    per_token = ("loss_mask", "rollout_log_probs", "weight_version", "advantages")
    assert [len(record[name]) for name in per_token] == [4, 4, 4, 4]
    assert record["rollout_log_probs"] == [0.0, 0.0, -0.12346, -0.5]
    assert set(record["turns"][0]) == set(re.findall(r"`(\w+)`", re.search(r"^\| `turns` \| (.*) \|", table, re.M)[1]))
    Path("step_000001.jsonl").write_text(json.dumps({**record, "response": "19"}) + "\n")
    exec(code_with("step_"))
    assert capsys.readouterr().out == "12 + 7 = -> 19\n"
