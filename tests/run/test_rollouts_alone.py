"""`miles rollout`: batches without training."""

import os
import signal

import pytest

import miles
from miles.config.load import resolve
from miles.errors import ConfigError, RunInterrupted
from miles.jobs import run_rollouts
from miles.rollout.dump import batch_file, count_batches
from miles.rollout.saved import read_groups


def rollouts(config, folder, **changes):
    return run_rollouts(resolve([config], (), overrides={"dump": str(folder), **changes}, purpose="rollout"))


def generated(folder, step):
    """What does not depend on clocks."""
    return [
        (s.id, s.prompt.id, s.tokens, s.seed, s.reward, s.status, s.columns["rollout_log_probs"].tolist())
        for group in read_groups(batch_file(folder, step))
        for s in group.samples
    ]


def test_rollouts_are_those_of_the_run_and_can_be_trained_on(config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    live = miles.train(config, dump=str(two), num_rollout=1)
    ahead = {"rollout.mode": "fully_async", "rollout.max_weight_staleness": 2}  # which say nothing of rollouts alone
    found = rollouts(config, one, **ahead)
    assert count_batches(one) == 2
    assert generated(one, 1) == generated(two, 1)
    assert [batch["rollout/samples/trained"] for batch in found] == [16, 16]
    assert found[0]["rollout/generated_tokens"] == live.totals.generated_tokens
    assert found[0]["rollout/reward"] == pytest.approx(live.metrics["rollout/reward"])
    again = {**config, "eval": {}, "run": {**config["run"], "dir": str(tmp_path / "again")}}
    assert miles.train(again, replay=str(one)).metrics["train/loss"] != 0


def test_a_half_finished_dump_is_gone_on_with(config, tmp_path):
    rollouts(config, tmp_path / "whole")
    assert len(rollouts(config, tmp_path / "parts", num_rollout=1)) == 1
    batch_file(tmp_path / "parts", 2).write_text("cut off")
    assert len(rollouts(config, tmp_path / "parts")) == 1
    assert rollouts(config, tmp_path / "parts") == []
    for step in (1, 2):
        assert generated(tmp_path / "parts", step) == generated(tmp_path / "whole", step)
    with pytest.raises(ConfigError, match=r"another experiment:\n  rollout.batch_size: 4 then, 8 now"):
        rollouts(config, tmp_path / "parts", rollout_batch_size=8)
    with pytest.raises(ConfigError, match=r"another experiment:\n  maker: 'miles rollout' then, 'miles train' now"):
        miles.train(config, dump=str(tmp_path / "parts"))


def test_whole_batches_stay_when_somebody_stops(config, tmp_path):
    """In the middle of the second batch."""
    judge, calls = config["data"]["sets"][0]["reward"], []

    def stopping(sample):
        calls.append(sample.id)
        if len(calls) == 24:
            os.kill(os.getpid(), signal.SIGINT)
        return judge(sample)

    config["data"]["sets"][0]["reward"] = stopping
    with pytest.raises(RunInterrupted, match="SIGINT"):
        rollouts(config, tmp_path / "dump", num_rollout=3)
    assert count_batches(tmp_path / "dump") == 1
    assert len(rollouts(config, tmp_path / "dump", num_rollout=3)) == 2


def test_weights_of_a_checkpoint(config, tmp_path):
    config["optimizer"]["lr"] = 0.1
    miles.train(config)
    rollouts(config, tmp_path / "before", num_rollout=1)
    rollouts(config, tmp_path / "after", num_rollout=1, load=str(tmp_path / "run"))
    assert generated(tmp_path / "before", 1) != generated(tmp_path / "after", 1)
    after = read_groups(batch_file(tmp_path / "after", 1))[0].samples[0]
    assert set(after.columns["weight_version"][after.prompt_length :].tolist()) == {2}
    with pytest.raises(ConfigError, match=r"another experiment:\n  weights: '.*step_000002' then, '' now"):
        rollouts(config, tmp_path / "after")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"dump": None}, "where shall the batches go"), ({"replay": "folder"}, "is for training: nothing is generated")],
)
def test_what_a_rollout_needs(config, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        rollouts(config, tmp_path / "dump", **changes)
