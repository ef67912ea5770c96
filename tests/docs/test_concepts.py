"""docs/concepts.md names files, classes and metrics that exist, and its arithmetic is that of the code."""

import importlib
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

from miles.config import Config
from miles.config.derived import Derived
from miles.training.aggregation import token_weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")


def example():
    (block,) = re.findall(r"^((?:    (?:rollout|train): .*\n)+)", PAGE, re.M)
    return yaml.safe_load("".join(line[4:] + "\n" for line in block.splitlines()))


def test_files_exist():
    files = set(re.findall(r"(?:miles|plugins|examples)/[\w./-]+\.(?:py|md)", PAGE))
    assert len(files) > 30
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_files_in_the_picture_exist():
    picture = PAGE.partition("## The picture")[2].partition("\n\n`miles/build.py`")[0]
    rows = [re.search(r"   (miles/\S.*)$", line) for line in picture.splitlines()]
    rows = [row[1].split(", ") for row in rows if row]
    assert len(rows) > 8
    for first, *others in rows:
        folder = (ROOT / first).parent
        for name in (first, *others):
            assert (ROOT / name).exists() or (folder / name).exists(), name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(miles\.[\w.]+)`", PAGE))))
def test_names_of_python_exist(name):
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), attribute)


def test_numbers_follow_from_the_example():
    derived = Derived.of(Config.model_validate(example()))
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE, re.M)
    assert len(rows) == 6
    assert {name: int(number) for name, number in rows} == {name: getattr(derived, name) for name, _ in rows}


def test_the_other_way_round():
    config = example()
    del config["train"]["global_batch_size"]
    config["train"]["num_steps_per_rollout"] = int(re.search(r"--num-steps-per-rollout (\d)", PAGE)[1])
    assert Derived.of(Config.model_validate(config)) == Derived.of(Config.model_validate(example()))


def test_steps_of_epochs():
    epochs, prompts, steps = re.search(r"`num_epoch: (\d)`.* (\d+) prompts make (\d+) steps", PAGE).groups()
    config = example()
    config["rollout"] = {**config["rollout"], "num_rollout": None, "num_epoch": float(epochs)}
    assert Derived.of(Config.model_validate(config), prompts_per_epoch=int(prompts)).num_rollout == int(steps)


def test_weights_of_tokens():
    short, long = map(int, re.search(r"two samples with (\d) and (\d) trainable", PAGE).groups())
    rows = re.findall(r"^\| `(\w+)`(?:, of (\d+))? \| (\d+/\d+) \| (\d+/\d+) \|", PAGE, re.M)
    assert [row[0] for row in rows] == ["sample_mean", "token_mean", "constant", "sequence_sum"]
    for name, constant, in_short, in_long in rows:
        weights_T = token_weights(
            torch.ones(short + long), [0, short, short + long], torch.tensor([0, 1]), name, float(constant or 0) or None
        )
        expected = torch.tensor([float(Fraction(in_short))] * short + [float(Fraction(in_long))] * long)
        assert torch.allclose(weights_T, expected), name


def test_every_word_of_the_page_is_explained_once():
    words = re.findall(r"^\*\*([^*]+)\.\*\*", PAGE, re.M)
    assert len(words) == len(set(words)) > 30
