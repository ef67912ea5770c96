"""docs/algorithms.md: its tables are what the plugins register, and what it shows is what the commands print."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from miles.api import Component, LossInputs
from miles.cli import main
from miles.kinds import KINDS
from miles.testing.batches import rollout_batch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import algorithms  # noqa: E402

PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


def rows(text, title):
    """The first cells of a section's table."""
    section = text[text.index(f"### {title}\n") :].partition("\n### ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.M)


def test_the_page_is_not_stale(capsys):
    assert algorithms.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("advantage_estimators", "Advantage estimators"),
        ("policy_losses", "Policy losses"),
        ("loss_masks", "Loss masks"),
        ("is_corrections", "IS corrections"),
        ("presets", "Presets"),
    ],
)
def test_the_command_lists_the_names_of_the_table(kind, title, capsys):
    assert main(["plugins", "--kind", kind]) == 0
    listing = capsys.readouterr().out.partition(f"{kind} (")[2]
    ours = algorithms.packages()
    listed = [name for name, package in re.findall(r"^  (\S+) +(\S+) ", listing, re.M) if package in ours]
    assert rows(PAGE, title) == listed != []


def test_every_kind_of_algorithm_has_a_table():
    named = {kind.name for kind in algorithms.algorithm_kinds()}
    assert named == {name for name, kind in KINDS.items() if any(key.startswith("algorithm.") for key in kind.keys)}
    assert len(named) == len(re.findall(r"^### ", PAGE[PAGE.index("## All names") :].partition("\n## ")[0], re.M))


def test_a_row_says_options_flags_needs_and_paper():
    """As worked out by hand from the plugins' declarations."""
    (row,) = re.findall(r"^\| `m2po` \| (.*) \|$", PAGE, re.M)
    package, _, options, needs, paper = row.split(" | ")
    assert package == "[miles-is-corrections](../plugins/algorithms/miles-is-corrections/README.md)"
    assert options == "`threshold` `0.04` (`--m2po-threshold`)"
    assert needs == "rollout log probs"
    assert paper == "[2510.01161](https://arxiv.org/abs/2510.01161)"
    assert "| selected by `--use-tis`; `low` `0.0` (`--tis-clip-low`);" in PAGE
    assert "| `bypass` |" in PAGE
    assert "`algorithm.old_logprobs: rollout`, `algorithm.is_correction: none` |" in PAGE


def test_texts_of_components_fit_into_a_table():
    assert algorithms._escaped("|r - 1|") == r"\|r - 1\|"
    assert algorithms.linked("arXiv:1707.06347, Ann 1992") == (
        "[1707.06347](https://arxiv.org/abs/1707.06347), Ann 1992"
    )
    assert algorithms._options(Component("a:b")) == ""


def test_what_the_page_shows_is_what_the_command_prints(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^```console\n\$ miles (.*)\n((?:.*\n)*?)```$", PAGE, re.M)
    assert shown
    for words, output in shown:
        assert main(words.split()) == 0
        assert capsys.readouterr().out == output


def test_a_page_without_markers_is_an_error():
    with pytest.raises(SystemExit, match=r"names -->.* are not there"):
        algorithms.page_with({"names": "text"}, "no markers here")


@pytest.mark.parametrize("folder", ["algorithms", "staleness"])
def test_results_become_a_table_and_charts(folder, tmp_path, monkeypatch):
    example = tmp_path / "examples" / folder
    example.mkdir(parents=True)
    module = algorithms.study(folder)
    monkeypatch.setattr(algorithms, "study", lambda name: module)
    monkeypatch.setattr(algorithms, "ROOT", tmp_path)
    assert algorithms.results(folder) is None
    curve = {"steps": [0, 2, 4], "seconds": [0.0, 1.0, 2.0], "greedy": [0.1, 0.5, 0.75], "sampled": [0.1, 0.2, 0.3]}
    name = {"algorithms": "grpo", "staleness": "none-lag0"}[folder]
    made = {"date": "2026-01-02", "machine": "x86_64, 16 cores", "torch": "2.11.0"}
    (example / "results.json").write_text(json.dumps({"made": made, "curves": {name: {"1": curve, "2": curve}}}))
    text, charts = algorithms.results(folder)
    assert text.startswith("2026-01-02, x86_64, 16 cores, torch 2.11.0.\n\n|")
    assert "0.750 (0.750 to 0.750)" in text
    assert charts
    for file, picture in charts.items():
        assert f"](images/{file})" in text
        assert picture.startswith("<svg")


def test_the_functions_of_the_page_do_what_they_say():
    [code] = re.findall(r"^```python my_algorithm.py\n(.*?)^```", PAGE, re.M | re.S)
    mine: dict = {}
    exec(code, mine)
    batch = rollout_batch([0.2, 0.9, 0.9, -1.0], [4, 4, 4, 7], [1, 2, 1, 1])
    assert mine["best_of"](batch)[batch.mask_T > 0].tolist() == [0, 1, 1, 1, 1]
    new_T, old_T = torch.tensor([math.log(0.5), math.log(0.9)]), torch.tensor([math.log(0.5), math.log(0.3)])
    mask_T, bounds = torch.ones(2), [0, 2]
    loss = mine["squashed"](LossInputs(new_T, old_T, torch.tensor([1.0, -2.0]), mask_T, bounds))
    torch.testing.assert_close(loss.loss_T, torch.tensor([-math.tanh(1), 2 * math.tanh(3)]))
    torch.testing.assert_close(loss.metrics_T["ratio"], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(mine["at_most_two"](new_T, old_T, mask_T, bounds).weights_T, torch.tensor([1.0, 2.0]))
