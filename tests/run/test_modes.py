"""Modes of rollout on a real model: what they have in common with sync, and what becomes of what is under way."""

import json
import math
import time

import numpy as np
import pytest
import torch
from miniature import final_state, metrics
from transformers import AutoModelForCausalLM

import miles
from miles.api import RunInterrupted, hookimpl
from miles.builtins.torch_engine.scheduler import Scheduler
from miles.rollout.saved import read_groups

LAX = {"deterministic": False}


def settings(config, tmp_path, name, **rollout):
    run = {**config["run"], **LAX, "dir": str(tmp_path / name)}
    return config | {"run": run, "rollout": {**config["rollout"], "num_rollout": 4, **rollout}}


def samples(run_dir):
    return [
        json.loads(line) for path in sorted((run_dir / "rollouts").iterdir()) for line in path.read_text().splitlines()
    ]


class Watch:
    """Groups of every step, as they are handed to training, and the weights of that moment."""

    def __init__(self):
        self.batches = []

    @hookimpl
    def miles_on_rollout_end(self, run, step, groups, metrics):
        self.batches.append((step, groups))


def versions(watch):
    return [
        (step, sample.columns["weight_version"][sample.loss_mask == 1])
        for step, groups in watch.batches
        for group in groups
        for sample in group.samples
    ]


def test_fully_asynchronous_where_nothing_may_be_stale_is_sync_bit_for_bit(config, tmp_path):
    miles.train(settings(config, tmp_path, "sync"))
    miles.train(settings(config, tmp_path, "async", mode="fully_async", max_weight_staleness=0))
    sync, never_stale = final_state(tmp_path / "sync"), final_state(tmp_path / "async")
    assert sync.keys() == never_stale.keys()
    assert all((sync[name] == never_stale[name]).all() for name in sync)
    for before, after in zip(metrics(tmp_path / "sync"), metrics(tmp_path / "async"), strict=True):
        assert before == {name: value for name, value in after.items() if name in before}
    assert samples(tmp_path / "sync") == samples(tmp_path / "async")


def test_one_step_off_repeats_itself_and_is_one_version_behind(config, tmp_path):
    watch = Watch()
    job = {"mode": "one_step_off"}
    first = miles.train(settings(config, tmp_path, "one", **job), plugins=[watch])
    assert {(step, version) for step, drawn in versions(watch) for version in drawn.tolist()} == {
        (0, 0), (1, 0), (2, 1), (3, 2),
    }  # fmt: skip
    miles.train(settings(config, tmp_path, "two", **job))
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert all((one[name] == two[name]).all() for name in one)
    assert first.summary["rollouts"]["fates"] == {"trained": 64}
    assert first.summary["rollouts"]["pending"] == 0


def test_an_engine_in_a_process_of_its_own_generates_while_the_trainer_trains(config, tmp_path):
    apart = {"executor": "local", "colocate": False}
    rollout = {"mode": "fully_async", "max_weight_staleness": 1, "num_engines": 1}
    run = miles.train(settings(config, tmp_path, "run", **rollout) | {"resources": apart})
    assert run.summary["rollouts"]["fates"]["trained"] == 64
    last = metrics(tmp_path / "run")[-1]
    assert 0 <= last["rollout/staleness/mean"] <= last["rollout/staleness/max"] <= 1
    assert last["eval/heldout/weight_version"] == 4


def test_what_is_drawn_while_others_evaluate_is_counted(config, tmp_path):
    watch = Watch()
    config["eval"]["interval"] = 1
    rollout = {"mode": "fully_async", "max_weight_staleness": 2}
    run = miles.train(settings(config, tmp_path, "run", **rollout), plugins=[watch])
    drawn = [s.response_length for _, groups in watch.batches for group in groups for s in group.samples]
    assert run.summary["tokens"]["generated"] == sum(drawn)


class Overtaken(Watch):
    """Keeps all weights, and lets the engine draw ten more tokens of each batch under way before the next ones come."""

    def __init__(self):
        super().__init__()
        self.weights, self.steps_left = {}, math.inf

    @hookimpl
    def miles_on_rollout_end(self, run, step, groups, metrics):
        super().miles_on_rollout_end(run, step, groups, metrics)
        self.steps_left = 10

    @hookimpl
    def miles_on_weight_sync_end(self, run, version, metrics):
        held = run.parts.engines[0].loader.held()
        self.weights[version] = {name: tensor.clone() for group in held for name, tensor in group.items()}
        self.steps_left = math.inf

    def step(self, scheduler, step=Scheduler.step):
        """In the engine's thread."""
        if self.steps_left <= 0:
            time.sleep(0.001)
            return
        self.steps_left -= 1
        step(scheduler)


@pytest.mark.parametrize("pause_mode", ["retract", "abort", "in_place"])
def test_tokens_of_several_versions_say_so_and_are_what_those_weights_say(
    pause_mode, config, checkpoint, tmp_path, monkeypatch
):
    """Long answers, and new weights in the middle of them."""
    watch = Overtaken()
    monkeypatch.setattr(Scheduler, "step", lambda scheduler: watch.step(scheduler))
    config["data"]["sets"][0]["sampling"] = {"max_new_tokens": 60}
    config["eval"] = {}
    rollout = {"mode": "fully_async", "max_weight_staleness": 1, "pause_mode": pause_mode, "batch_size": 2}
    run = miles.train(settings(config, tmp_path, "run", **rollout, n_samples_per_prompt=2), plugins=[watch])
    drawn = versions(watch)
    assert all((np.diff(v) >= 0).all() and v.max() <= step and step - v.min() <= 1 for step, v in drawn)
    assert any(v.min() < v.max() for _, v in drawn)
    assert metrics(tmp_path / "run")[-1]["rollout/staleness/max"] <= 1
    assert run.producer.ledger.fates["trained"] == 16
    run.producer.ledger.check(())

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for sample in (sample for _, groups in watch.batches for group in groups for sample in group.samples):
        version, said = sample.columns["weight_version"], sample.columns["rollout_log_probs"]
        numbers = sorted(set(version[version >= 0].tolist()))
        for number in numbers[:1] if pause_mode == "in_place" else numbers:  # later ones have a cache of older weights
            model.load_state_dict(watch.weights[number], strict=False)
            with torch.no_grad():
                logits_TV = model(torch.tensor([sample.tokens])).logits[0]
            log_probs_T = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(sample.tokens[1:])[:, None])[:, 0]
            by_it = np.flatnonzero(version == number)
            assert said[by_it] == pytest.approx(log_probs_T.numpy()[by_it - 1], abs=1e-4)


def test_partial_rollouts_go_on_in_the_next_step(config, tmp_path):
    watch = Watch()
    config["data"]["sets"][0]["sampling"] = {"max_new_tokens": 40}
    rollout = {"partial_rollout": True, "over_sampling_batch_size": 8, "mask_offpolicy_in_partial_rollout": True}
    rollout["concurrency"] = 18  # answers are of one length: two of the fifth group's four begin later
    run = miles.train(settings(config, tmp_path, "run", **rollout), plugins=[watch])
    continued = False
    for step, groups in watch.batches:
        for sample in (s for group in groups for s in group.samples):
            drawn = sample.columns["weight_version"]
            assert ((sample.loss_mask == 1) <= (drawn == step)).all()
            assert len(sample.columns["rollout_log_probs"]) == len(sample.tokens)
            assert sample.response_length <= 40
            continued |= drawn[sample.prompt_length] < drawn[-1]
    assert continued
    assert run.summary["rollouts"]["fates"] == {"trained": 64}


@pytest.mark.parametrize(
    "rollout",
    [{"mode": "fully_async"}, {"mode": "one_step_off"}, {"partial_rollout": True, "over_sampling_batch_size": 6}],
)
def test_a_run_that_is_stopped_goes_on_with_what_it_had(rollout, config, tmp_path):
    class Stop:
        @hookimpl
        def miles_on_train_step_end(self, run, step, metrics):
            if step == 1:
                run.interrupt.signal = 15
                run.interrupt._asked.set()

    with pytest.raises(RunInterrupted):
        miles.train(settings(config, tmp_path, "run", **rollout), plugins=[Stop()])
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_000002")
    held = read_groups(saved / "rollouts.npz")
    state = json.loads((saved / "state.json").read_text())["producer"]
    assert state["ledger"]["started"] == sum(state["ledger"]["fates"].values()) + 4 * len(held)
    run = miles.train(settings(config, tmp_path, "run", **rollout))
    assert run.resumed_from == 2
    assert run.summary["rollouts"]["fates"]["trained"] == 64
    trained = [(line["group_id"], line["id"]) for line in samples(tmp_path / "run")]
    assert len(trained) == len(set(trained)) == 64
    assert {group.id for group in held} <= {group for group, _ in trained} | {group.id for group in run.producer.held()}


def test_what_a_plugin_takes_out_of_a_batch_is_accounted_for(config, tmp_path):
    class Picky:
        @hookimpl
        def miles_modify_samples(self, run, step, groups):
            del groups[0].samples[1:]

    run = miles.train(settings(config, tmp_path, "run"), plugins=[Picky()])
    assert run.summary["rollouts"]["fates"] == {"trained": 52, "removed": 12}
    assert metrics(tmp_path / "run")[-1]["rollout/samples/removed"] == 3.0
