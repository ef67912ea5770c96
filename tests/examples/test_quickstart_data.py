"""The quickstart's task and checkpoint: right labels, splits that share nothing, the same files for the same seed."""

import json
import random
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "prepare.py"


def load_script():
    spec = spec_from_file_location("quickstart_prepare", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    prepare.prepare(out, seed=3)
    return out


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def operands(row):
    a, b = row["input"].removesuffix("=").split("+")
    return int(a), int(b)


def test_splits_have_their_sizes_and_share_no_sum(folder):
    splits = {split: [frozenset(operands(row)) for row in rows(folder, split)] for split in prepare.SIZES}
    assert {split: len(sums) for split, sums in splits.items()} == prepare.SIZES
    assert len(splits["heldout"]) >= 500
    everything = [pair for sums in splits.values() for pair in sums]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("split", ["train", "dev", "heldout"])
def test_labels_are_the_sums(folder, split):
    for row in rows(folder, split):
        a, b = operands(row)
        assert 100 <= a <= 999
        assert 100 <= b <= 999
        assert row == {"input": f"{a}+{b}=", "label": str(a + b).zfill(4)}


def test_the_pupil_errs_only_by_forgotten_carries(folder):
    forgotten = {10 * i + 100 * j + 1000 * k for i in (0, 1) for j in (0, 1) for k in (0, 1)}
    assert {sum(operands(row)) - int(row["label"]) for row in rows(folder, "sft")} == forgotten


def test_share_of_the_pupils_right_answers(folder):
    """A sum with c carries is answered right with probability 0.35 ** c; expected over all sums, column by column."""
    digits = [(x, y) for x in range(10) for y in range(10)]
    leading = [(x, y) for x in range(1, 10) for y in range(1, 10)]
    expected = {0: 1.0, 1: 0.0}  # carry into the column -> mean of 0.35 ** carries so far, on those sums
    for column in (digits, digits, leading):
        following = {0: 0.0, 1: 0.0}
        for carry, mass in expected.items():
            for x, y in column:
                out = int(x + y + carry >= 10)
                following[out] += mass / len(column) * (0.35 if out else 1.0)
        expected = following
    right = [sum(operands(row)) == int(row["label"]) for row in rows(folder, "sft")]
    assert sum(right) / len(right) == pytest.approx(sum(expected.values()), abs=0.014)  # four standard deviations


@pytest.mark.parametrize(("forgets", "answer"), [(0.0, "1434"), (1.0, "0324")])
def test_careless_sum_at_its_extremes(monkeypatch, forgets, answer):
    monkeypatch.setattr(prepare, "FORGETS", forgets)
    assert prepare.careless_sum(895, 539, random.Random(0)) == answer


def test_the_command_writes_the_same_files_again(folder, tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path, "--seed", "3"], check=True, capture_output=True)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_another_seed_is_another_task_and_another_model():
    assert prepare.task(3)["heldout"][:20] != prepare.task(4)["heldout"][:20]
    tokenizer = prepare.build_tokenizer()
    first, second = (prepare.build_model(tokenizer, seed).lm_head.weight for seed in (3, 4))
    assert not torch.equal(first, second)


def test_tokenizer_round_trips_any_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for text in ("123+456=", "  two  blanks\n\ttab", "déjà vu 😀", "".join(map(chr, range(128)))):
        tokens = tokenizer(text)["input_ids"]
        assert tokens == list(text.encode())
        assert tokenizer.decode(tokens) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 258, 259)


def test_chat_template_is_chatml(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    said = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == said
    assert tokenizer.apply_chat_template(messages, tokenize=False) == said + "2<|im_end|>\n"


def test_model_is_tiny_and_loads(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.model_type == "qwen3"
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.generation_config.eos_token_id == 258
    logits = model(torch.tensor([list(b"123+456=")])).logits
    assert logits.shape == (1, 8, 259)
    assert torch.isfinite(logits).all()
