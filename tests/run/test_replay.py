"""Training on what another run has generated."""

import errno
import json
import os
import re

import pytest
from miniature import assert_same_end, metrics

import miles
from miles.cli.describe import describe
from miles.config.load import resolve
from miles.errors import ConfigError, RolloutError
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.report.compare import compare
from miles.rollout.dump import batch_file, count_batches
from miles.rollout.saved import read_groups

OF_ENGINES = ("rollout/generated_tokens", "rollout/cached_ratio", "rollout/failed_ratio", "eval/", "data/")
"""What a run says of itself that has engines."""


def dumped(config, folder, **flags):
    """A run that writes its batches to a folder; the same configuration for one that replays them elsewhere."""
    miles.train(config, dump_rollouts=str(folder), **flags)
    beside = folder.parent / "replayed"
    sets = [{**config["data"]["sets"][0], "path": "gone.jsonl"}]
    return {**config, "run": {**config["run"], "dir": str(beside)}, "eval": {}, "data": {"sets": sets}}, beside


def test_a_replay_learns_what_the_run_did(config, tmp_path):
    again, beside = dumped(config, tmp_path / "dump")
    assert count_batches(tmp_path / "dump") == 2
    again["resources"] = {"rollout_num_gpus": 2, "rollout_num_gpus_per_engine": 2}
    again["rollout"] = {**again["rollout"], "engine": {"name": "torch", "max_batch_size": 7}}
    run = miles.train(again, replay=str(tmp_path / "dump"))
    assert not run.parts.front.generates
    assert_same_end(tmp_path / "run", beside, but=OF_ENGINES)
    assert any("train/loss" in step for step in metrics(beside))
    assert compare(tmp_path / "run", beside).within(0.0)


@pytest.mark.parametrize("rollout", [{"mode": "fully_async", "max_weight_staleness": 2}, {"partial_rollout": True}])
def test_samples_of_older_weights_are_learnt_from_as_such(config, tmp_path, rollout):
    """Their old log-probs are those of the rollout, in the run as in its replay."""
    config["rollout"] |= rollout
    config["run"]["deterministic"] = False
    again, beside = dumped(config, tmp_path / "dump")
    again["run"]["deterministic"] = True  # as a replay may be, whatever drew its samples
    miles.train(again, replay=str(tmp_path / "dump"))
    assert_same_end(tmp_path / "run", beside, but=("rollout/", "eval/", "data/"))


def test_a_replay_of_what_older_weights_drew_compares_with_these(config, tmp_path):
    config["run"]["deterministic"] = False
    config["rollout"]["num_rollout"] = 3
    again, beside = dumped(config, tmp_path / "dump", rollout_mode="one_step_off")
    miles.train(again, replay=str(tmp_path / "dump"))
    assert_same_end(
        tmp_path / "run", beside, but=(*OF_ENGINES, "rollout/staleness", "rollout/groups/", "rollout/samples")
    )
    about = tmp_path / "dump" / "dump.json"
    about.write_text(about.read_text().replace('"miles train"', '"miles rollout"').replace("one_step_off", "sync"))
    again["run"]["dir"] = str(tmp_path / "alone")
    run = miles.train(again, replay=str(tmp_path / "dump"))
    assert not run.trainer.on_policy
    assert_same_end(beside, tmp_path / "alone")


@pytest.mark.slow
def test_two_ranks(config, tmp_path):
    config["rollout"]["num_rollout"] = 1
    two = {"actor_num_gpus_per_node": 2}
    again, beside = dumped(config, tmp_path / "dump", **two)
    miles.train(again, replay=str(tmp_path / "dump"), **two)
    assert_same_end(tmp_path / "run", beside, but=OF_ENGINES)


def test_a_resumed_replay_goes_on_with_the_next_batch(config, tmp_path):
    again, beside = dumped(config, tmp_path / "dump")
    (tmp_path / "dump" / "step_000002.npz").rename(tmp_path / "later.npz")
    run = miles.train(again, replay=str(tmp_path / "dump"), num_rollout=1)
    assert run.step == 1
    (tmp_path / "later.npz").rename(tmp_path / "dump" / "step_000002.npz")
    again["rollout"] = {k: v for k, v in again["rollout"].items() if k != "num_rollout"}
    run = miles.train(again, replay=str(tmp_path / "dump"))
    assert (run.resumed_from, run.step) == (1, 2)
    assert_same_end(tmp_path / "run", beside, but=(*OF_ENGINES, "train/lr"))


def test_a_run_that_is_resumed_writes_the_rest(config, tmp_path):
    miles.train(config, dump=str(tmp_path / "dump"), num_rollout=1, save_interval=1)
    batch_file(tmp_path / "dump", 2).write_text("of an earlier life")
    batch_file(tmp_path / "dump", 3).write_text("of an earlier life")
    miles.train(config, dump=str(tmp_path / "dump"))
    assert [len(read_groups(batch_file(tmp_path / "dump", step))) for step in (1, 2)] == [4, 4]
    assert count_batches(tmp_path / "dump") == 2


def test_a_full_disk(config, tmp_path, monkeypatch):
    def full(path, groups):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("miles.rollout.dump.write_groups", full)
    with pytest.raises(RolloutError, match=r"batch of step 1 could not be written to .*dump: No space left on device"):
        miles.train(config, dump=str(tmp_path / "dump"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"rollout.dump .*file cannot be written: File exists"):
        miles.train(config, dump=str(tmp_path / "file"), resume="never")


def test_flags_of_the_engine_are_left_out():
    said = ["--rollout-engine", "torch", "--torch-max-batch-size", "4", "--colocate", "--weight-sync", "disk"]
    said += ["--rollout-mode", "fully_async", "--max-weight-staleness", "2"]
    registry = Registry(load_plugins())
    given = {"model": {"hf_checkpoint": "x"}, "data": {"sets": [{"name": "a", "path": "a"}]}}
    config = resolve([given], [*said, "--replay", "folder"], registry=registry).config
    assert (config.rollout.engine.name, config.rollout.engine.options) == ("none", {})
    assert (config.weight_sync.transport.name, config.resources.colocate) == ("auto", False)
    assert config.rollout.num_epoch == 1
    kept = resolve([given], [*said, "--num-rollout", "1", "--replay", "folder"], registry=registry, purpose="show")
    assert kept.origin("rollout.engine").where == "follows from --replay"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_rollout": 2}, "num_rollout=2, and .*dump holds 1 batches: --num-rollout 1"),
        ({"rollout_batch_size": 2, "num_rollout": 1}, "rollout.batch_size is 2, and the batches of .* with 4"),
        ({"rollout_temperature": 0.5, "num_rollout": 1}, "the temperature is 0.5, and the batches .* with 1.0"),
        ({"eval.sets": "KEEP"}, r"eval.sets = \['heldout'\](.|\n)*starts no engine(.|\n)*--eval.sets=\[\]"),
        ({"dump": "elsewhere"}, "the batches are in rollout.replay already"),
        ({"replay": "REPLAY/nowhere"}, r"nowhere holds no rollouts: it has no dump.json(.|\n)*did you mean|exists"),
    ],
)
def test_what_cannot_be_replayed(one_dumped, changes, said):
    again, folder, held_out = one_dumped
    changes = {"replay": str(folder), **changes}
    changes["replay"] = changes["replay"].replace("REPLAY", str(folder.parent))
    if "eval.sets" in changes:
        changes["eval.sets"] = held_out
    with pytest.raises(ConfigError, match=said):
        miles.train(again, **changes)
    assert not (folder.parent / "replayed").exists()


@pytest.fixture(scope="module")
def one_dumped(checkpoint, tmp_path_factory):
    from miniature import job, sums_in

    tmp_path = tmp_path_factory.mktemp("one")
    config = job(checkpoint, sums_in(tmp_path), tmp_path)
    held_out, config["eval"] = config["eval"]["sets"], {}
    again, _ = dumped(config, tmp_path / "dump", num_rollout=1)
    return again, tmp_path / "dump", held_out


def test_a_dry_run_counts_the_batches(one_dumped):
    again, folder, _ = one_dumped
    plugins = load_plugins()
    rollout = {k: v for k, v in again["rollout"].items() if k != "num_rollout"}
    said = describe(resolve([{**again, "rollout": rollout}], ["--replay", str(folder)], plugins), plugins)
    assert f"rollout.replay  {folder}  1 step" in said
    assert re.search(r"num_rollout +1\n", said)


def test_evaluation_sets_can_be_left_out_on_the_command_line(config, tmp_path):
    config["eval"]["interval"] = 1
    left = resolve([config], ["--eval.sets=[]", "--replay", "folder"]).config
    assert left.eval.sets == ()
    assert left.rollout.engine.name == "none"


def test_a_folder_of_another_experiment(one_dumped):
    again, folder, _ = one_dumped
    with pytest.raises(
        ConfigError, match=r"holds rollouts of another experiment:\n  optimizer.lr: 0.001 then, 1.0 now"
    ):
        miles.train(again, dump=str(folder), lr=1.0, **{"data.sets.*.path": str(folder.parent / "sums.jsonl")})
    about = folder / "dump.json"
    text = about.read_text()
    try:
        about.write_text(json.dumps({**json.loads(text), "format": "miles dump 2"}))
        with pytest.raises(ConfigError, match=r"dump.json cannot be read: its format is 'miles dump 2'"):
            miles.train(again, replay=str(folder))
        about.unlink()
        with pytest.raises(ConfigError, match=r"holds batches, and no dump.json says of what"):
            miles.train(again, dump=str(folder), **{"data.sets.*.path": str(folder.parent / "sums.jsonl")})
    finally:
        about.write_text(text)
