"""What is written of a sample."""

import json

import numpy as np
import pytest

from miles.report.dump import dump_samples
from miles.types import LOSS_MASK, Prompt, Sample, Status


def sample(id=3):
    one = Sample.begin(Prompt(id="s:0", task_set="s", text="x", tokens=[1]), id=id, group_id=0)
    one.append([2], {LOSS_MASK: 1})
    return one


def written(folder, samples, learned):
    dump_samples(folder, 7, samples, learned)
    lines = (folder / "step_000007.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_a_failed_sample_is_dumped_with_its_reason(tmp_path):
    one = sample()
    one.status, one.error = Status.FAILED, "ValueError: no"
    (record,) = written(tmp_path, [one], {})
    assert (record["status"], record["error"], record["loss_mask"]) == ("failed", "ValueError: no", [0, 1])
    assert record["loss"] is None
    assert "advantages" not in record


def test_what_an_environment_said_of_a_trajectory_is_in_its_row_and_nothing_else_of_its_metadata(tmp_path):
    told, plain = sample(3), sample(4)
    told.metadata |= {"environment": {"searches": 2, ("no", "key"): 3, "who": {4}}, "seconds": 0.1}
    one, other = written(tmp_path, [told, plain], {})
    assert one["environment"] == {"searches": 2, "('no', 'key')": 3, "who": "{4}"}
    assert "metadata" not in one
    assert "environment" not in other


def test_what_training_made_of_a_sample_goes_with_it(tmp_path):
    learned = {3: {"advantages": np.array([0.0, 0.123456789], np.float32), "loss": -0.1234567}}
    trained, left_out = written(tmp_path, [sample(3), sample(4)], learned)
    assert (trained["advantages"], trained["loss"]) == ([0.0, 0.12346], -0.12346)
    assert "advantages" not in left_out


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    one, learned = sample(), {3: {"advantages": np.array([0.0, np.nan], np.float32), "loss": float("inf")}}
    one.metadata["environment"] = {"scores": [1.0, float("nan")], "mean": np.float32("nan")}
    one.reward_parts = {"judge": float("-inf")}
    (record,) = written(tmp_path, [one], learned)
    assert (record["advantages"], record["loss"]) == ([0.0, None], None)
    assert record["environment"] == {"scores": [1.0, None], "mean": None}
    assert record["reward_parts"] == {"judge": None}
