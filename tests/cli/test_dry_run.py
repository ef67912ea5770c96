"""What would stop a run at once is found by a dry run, and by a run before it writes anything."""

import json
import re
import sys

import pytest

from miles.diagnosis import preflight as preflight_module
from miles.diagnosis.preflight import FIRST_ROWS

ROW = '{"input": "1+1", "label": "2"}\n'


@pytest.fixture
def refused(miles, base, tmp_path):
    """`refused("--flag", ...)` -> what a dry run says; a run says the same, and leaves nothing behind."""

    def refused(*flags):
        before = sorted(tmp_path.rglob("*"))
        code, out, dry = miles("train", *base, *flags, "--dry-run")
        assert (code, out) == (2, "")
        code, out, err = miles("train", *base, *flags)
        assert (code, out, err) == (2, "", dry)
        assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before
        return dry

    return refused


@pytest.mark.parametrize("flag", ["--hf-checkpoint", "--ref-load"])
def test_a_checkpoint_that_is_none(refused, tmp_path, flag):
    key = f"model.{flag[2:].replace('-', '_')}"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    said = refused(flag, "models/tiny")
    assert f"{key} = 'models/tiny'   ({flag})" in said
    assert "models/tiny is not a Hugging Face checkpoint: it has no config.json" in said
    assert "did you mean models/tiny?" in refused(flag, "./models/tinny")
    assert f"no checkpoint folder at {tmp_path}/none" in refused(flag, f"{tmp_path}/none")
    assert "the folder a/b does not exist either" in refused(flag, "a/b/c")


def test_a_checkpoint_that_may_be_one(miles, base, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    for name in ("tiny", "./tiny", "somebody/something", "gpt2"):
        assert miles("train", *base, "--hf-checkpoint", name, "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        (ROW + "\n{broken\n", [], "train.jsonl, line 3: not a JSON object"),
        (ROW + '{"input": "1+1"}\n', ["--label-key", "answer"], "line 1: no key 'answer', which keys.label names"),
        (ROW + '{"question": "1+1"}\n', [], "train.jsonl, line 2: no key 'input', which shall hold the prompt"),
        (ROW + '{"input": 3}\n', [], "train.jsonl, line 2: 'input' must be text"),
        ("", [], "train.jsonl has no usable row (0 malformed)"),
        ("[]\n", ["--bad-lines", "skip"], "train.jsonl has no usable row (1 malformed)"),
        (ROW, ["--data.sets.default.path=train.txt"], "expected a .jsonl or .parquet file"),
        (ROW, ["--data.sets.default.path=trian.jsonl@[0:1]"], "did you mean train.jsonl?"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(refused, tmp_path, text, flags, words):
    (tmp_path / "train.jsonl").write_text(text)
    assert words in refused(*flags)


def test_evaluation_reads_its_own_sets_alone(miles, base, tmp_path):
    (tmp_path / "held_out.jsonl").write_text("{}\n")
    flags = [*base, "--eval-prompt-data", "sums", "held_out.jsonl"]
    assert "eval.sets.sums.path = 'held_out.jsonl'" in miles("train", *flags, "--dry-run")[2]
    assert "held_out.jsonl, line 1: no key 'input'" in miles("eval", *flags)[2]
    (tmp_path / "train.jsonl").unlink()
    assert "train.jsonl" not in miles("eval", *flags)[2]


def test_the_first_rows_stand_for_a_long_file(miles, base, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_module, "FIRST_ROWS", 3)
    (tmp_path / "train.jsonl").write_text(ROW * 3 + "broken\n")
    code, out, _ = miles("train", *base, "--dry-run")
    assert code == 0
    assert "data.sets.default  train.jsonl  4 rows, the first 3 read" in out
    (tmp_path / "train.jsonl").write_text("broken\n" * 3 + ROW)
    assert "4 rows, the first 3 read, 3 malformed" in miles("train", *base, "--bad-lines", "skip", "--dry-run")[1]
    assert FIRST_ROWS >= 1000


def test_data_of_somebody_elses_source_is_not_looked_at(miles, base, tmp_path):
    (tmp_path / "train.jsonl").write_text("broken")
    (tmp_path / "my_rewards.py").write_text("def one(sample):\n    return 1.0\nclass Source:\n    pass\n")
    code, out, _ = miles("train", *base, "--data-source", "my_rewards:Source", "--dry-run")
    assert code == 0
    assert "read when the run begins" in out


def test_more_ranks_than_the_executor_starts(refused):
    said = refused("--actor-num-gpus-per-node", "8", "--executor", "inprocess")
    assert "resources.actor_num_gpus_per_node = 8   (--actor-num-gpus-per-node)" in said
    assert "executor 'inprocess' starts one train rank, not 8" in said
    assert "resources.actor_num_nodes = 2" in refused("--actor-num-nodes", "2", "--executor", "inprocess")


def test_more_gpus_than_the_machine_shows(refused, miles, base, monkeypatch):
    """A machine without GPUs does it on its CPU, unless GPUs are asked for."""
    shown = 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: shown)
    ranks, engines = ["--actor-num-gpus-per-node", "4"], ["--rollout-num-gpus", "2"]
    said = refused(*ranks, *engines)
    assert "resources.actor_num_gpus_per_node = 4   (--actor-num-gpus-per-node)" in said
    assert "4 train ranks (1 node x 4) + 2 for 2 engines = 6 GPUs, and this machine shows 2" in said
    assert "resources.rollout_num_gpus = 2   (--rollout-num-gpus)" in refused(*engines)
    assert "rollout.num_engines = 2   (--rollout-num-engines)" in refused("--rollout-num-engines", "2")
    shown = 0
    assert miles("train", *base, *ranks, *engines, "--dry-run")[0] == 0
    assert "and this machine shows 0\n      fix: --device cpu, or auto" in refused(*ranks, *engines, "--device", "cuda")
    shown = 6
    assert miles("train", *base, *ranks, *engines, "--dry-run")[0] == 0


PLACES = {
    (): """\
placement, 1 train rank (1 node x 1) = 1 GPU:
  role          workers  processes      devices        when idle        gets weights by
  trainer       1        this one       1 GPU, or CPU  stays in memory
  engine torch  1        the trainer's  the trainer's  stays in memory  inprocess, every 1 step
""",
    ("--actor-num-gpus-per-node", "4", "--rollout-num-gpus", "2", "--kl-coef", "0.1", "--device", "cuda"): """\
placement, 4 train ranks (1 node x 4) + 2 for 2 engines = 6 GPUs:
  role          workers  processes      devices        when idle        gets weights by
  trainer       4        4, by local    4 GPUs         stays in memory
  reference     4        the trainer's  the trainer's  stays in memory
  engine torch  2        2, by local    2 GPUs         stays in memory  broadcast, every 1 step
""",
    ("--actor-num-gpus-per-node", "2", "--colocate", "--device", "cpu", "--advantage-estimator", "ppo"): """\
placement:
  role          workers  processes      devices        when idle                         gets weights by
  trainer       2        2, by local    CPU            offloaded while engines generate
  critic        2        the trainer's  the trainer's  offloaded while engines generate
  engine torch  2        the trainer's  the trainer's  asleep while training             inprocess, every 1 step
""",
    ("--preset", "sft", "--generate", "dataset"): """\
placement, 1 train rank (1 node x 1) = 1 GPU:
  role     workers  processes  devices        when idle        gets weights by
  trainer  1        this one   1 GPU, or CPU  stays in memory
""",
}


@pytest.mark.parametrize("flags", PLACES)
def test_who_works_where(miles, base, monkeypatch, flags):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    code, out, _ = miles("train", *base, *flags, "--dry-run")
    assert code == 0
    assert PLACES[flags] in out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def one(sample, label):\n    return 1.0\n", "one(sample, label); write `(sample) -> float`"),
        ("async def one(args, sample, **kwargs):\n    return 1.0\n", "is the form of slime"),
        ("one = 3\n", "it has neither `score(sample)` nor `score_group(group)`"),
    ],
)
def test_a_reward_that_cannot_be_called(refused, tmp_path, code, words):
    (tmp_path / "my_rewards.py").write_text(code)
    said = refused()
    assert "data.sets.default.reward.0 = 'my_rewards:one'   (--rm-type)" in said
    assert words in " ".join(said.split())


def test_a_registered_reward_that_cannot_be_called(refused, tmp_path, monkeypatch):
    info = tmp_path / "site" / "miles_odd-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: miles-odd\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[miles]\nodd = miles_odd_plugin\n")
    (info.parent / "miles_odd_plugin.py").write_text(
        "from miles.api import Component, hookimpl\n\n\n@hookimpl\ndef miles_register_rewards():\n"
        "    return {'odd': Component('miles_odd_plugin:two')}\n\n\ndef two(sample, label):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(info.parent))
    said = refused("--rm-type", "odd")
    sys.modules.pop("miles_odd_plugin")
    assert "reward 'odd' of plugin 'odd' of miles-odd 0.3" in said
    assert "it is called with (sample), but is two(sample, label)" in said


def test_a_class_is_not_built(miles, base, tmp_path):
    (tmp_path / "my_rewards.py").write_text("class one:\n    def __init__(self):\n        raise MemoryError\n")
    assert miles("train", *base, "--dry-run")[0] == 0


def test_a_filter_of_ones_own_that_cannot_be_called(refused, tmp_path):
    (tmp_path / "my_rewards.py").write_text("def one(sample):\n    return 1.0\n\n\ndef keep(a, b):\n    return True\n")
    assert "rollout.filters.0 = 'my_rewards:keep'" in refused("--rollout.filters=my_rewards:keep")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("kit:addd", r"kit has no attribute 'addd'; did you mean 'add'\?"),
        ("kit:untold", r"tool untold \(.*kit.py:6\): "),
        ("toolkit_of_nobody:add", "cannot import toolkit_of_nobody: ModuleNotFoundError"),
    ],
)
def test_a_function_that_an_option_names_and_nobody_can_call(refused, tmp_path, named, words):
    code = 'def add(a: int):\n    """Add.\n\n    Args:\n        a: What."""\ndef untold(a): ...\n'
    (tmp_path / "kit.py").write_text(code)
    said = refused("--environment", "tools", f"--data.sets.default.environment.functions=kit:add,{named}")
    assert "data.sets.default.environment = 'tools'" in said
    assert re.search(words, said), said


def test_flags_of_slime_and_everything_else_in_one_message(refused, tmp_path):
    of_slime = ["--use-wandb", "--wandb-project", "x", "--wandb-mode", "y", "--wandb-project", "z", "--swiglu"]
    files = ["--hf-checkpoint", "./nowhere", "--prompt-data", "nothing.jsonl"]
    lines = refused(*of_slime, *files, "--actor-num-gpus-per-node", "8", "--executor", "inprocess").splitlines()
    assert lines[0] == "miles: 6 problems in the configuration:"
    assert [line.split(" =")[0].strip() for line in lines[1:] if not line.startswith("      ")] == [
        "--use-wandb",
        "--swiglu",
        "--wandb-project, --wandb-mode",
        "resources.actor_num_gpus_per_node",
        "data.sets.default.path",
        "model.hf_checkpoint",
    ]


def test_evaluation_is_not_turned_off_by_an_interval(refused):
    said = refused("--eval-interval", "0")
    assert "must be greater than 0" in said
    assert "For no evaluation leave eval.sets out" in said


def test_a_plugin_that_is_not_there_to_be_left_out(miles, base, tmp_path, caplog):
    flags = ["train", *base, "--dry-run"]
    assert miles(*flags, "-p", "no:lama")[0] == 0
    assert "no plugin 'lama' is installed that could be left out; did you mean 'llama'?" in caplog.text
    caplog.clear()
    (tmp_path / "run.yaml").write_text(json.dumps({"plugins": {"block": ["xyzzy", "miles-llama"]}}))
    assert miles("train", "run.yaml", *flags[1:])[0] == 0
    assert "no plugin 'xyzzy' is installed that could be left out; installed: builtin, " in caplog.text
    assert "miles-llama'" not in caplog.text
