"""Two runs beside each other: what is the same, and where they part."""

import json

import pytest
import torch
from safetensors.torch import save_file

from miles.cli import main
from miles.errors import ConfigError
from miles.report.compare import compare


def run_directory(folder, tokens=((5, 6, 7), (5, 8)), reward=0.5, weight=1.0, steps=2):
    (folder / "rollouts").mkdir(parents=True)
    lines = [
        {"step": step, "rollout/reward": reward, "perf/step_time": 0.1 * step, "time": step}
        for step in range(steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(1, steps + 1):
        records = [
            {"id": i, "rollout_id": i, "tokens": [1, 2, *said], "response": str(said)} for i, said in enumerate(tokens)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    save_file({"a": torch.full((2,), weight), "b": torch.zeros(3)}, folder / "hf" / "model.safetensors")
    return folder


def test_the_same(tmp_path):
    found = compare(run_directory(tmp_path / "a"), run_directory(tmp_path / "b"))
    assert (found.steps, found.tokens, found.first_token, found.weights) == (3, 2 * 9, None, 0.0)
    assert found.within(0.0)


def test_the_first_token_that_differs(tmp_path):
    other = run_directory(tmp_path / "b", tokens=((5, 6, 7), (5, 9, 9)))
    token = compare(run_directory(tmp_path / "a"), other).first_token
    assert (token.step, token.sample, token.position, token.found) == (1, 1, 3, (8, 9))
    assert "step 1, sample 1, token 3: 8 and 9" in str(token)


def test_one_that_ends_earlier(tmp_path):
    other = run_directory(tmp_path / "b", tokens=((5, 6), (5, 8)))
    token = compare(run_directory(tmp_path / "a"), other).first_token
    assert (token.position, token.found) == (4, (7, "nothing"))


@pytest.mark.parametrize(("change", "tolerance"), [({"reward": 0.501}, 1e-3), ({"weight": 1.001}, 1e-3)])
def test_numbers_to_a_tolerance(tmp_path, change, tolerance):
    found = compare(run_directory(tmp_path / "a"), run_directory(tmp_path / "b", **change))
    assert found.within(2 * tolerance)
    assert not found.within(tolerance / 2)


def test_a_metric_that_is_no_number_in_one_run_alone(tmp_path):
    first, nan, as_nan = (run_directory(tmp_path / n, reward=r) for n, r in (("a", 0.5), ("b", None), ("c", None)))
    assert not compare(first, nan).within(1.0)
    assert not compare(nan, first).within(1.0)
    assert compare(nan, as_nan).within(0.0)


def test_the_command(tmp_path, capsys):
    a, b = (str(run_directory(tmp_path / name, reward=reward)) for name, reward in (("a", 0.5), ("b", 0.75)))
    assert main(["compare", a, a]) == 0
    assert "the same, to 1e-05" in capsys.readouterr().out
    assert main(["compare", a, b, "--tolerance", "1e-3"]) == 1
    assert "rollout/reward: 0.5 and 0.75 at step 0" in capsys.readouterr().out


def test_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no run directory"):
        compare(run_directory(tmp_path / "a"), tmp_path)
