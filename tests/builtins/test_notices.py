"""What a run says when it cannot learn."""

from types import SimpleNamespace

from miles.builtins.notices import ADVANTAGE, nothing_learned
from miles.plugins import load_plugins

NOTHING = {ADVANTAGE: 0.0, "rollout/reward": 0.25}


def run_after(**metrics):
    return SimpleNamespace(metrics=metrics)


def test_a_batch_without_advantages_is_warned_of(caplog):
    nothing_learned(run_after(), 4, NOTHING)
    assert "step 5: all advantages are 0" in caplog.text
    assert "the same reward (0.25 on average)" in caplog.text
    assert "rollouts/step_000005.jsonl" in caplog.text


def test_a_batch_that_teaches_something_and_one_without_advantages_to_speak_of_are_not(caplog):
    nothing_learned(run_after(), 4, {ADVANTAGE: 1e-9})
    nothing_learned(run_after(), 4, {"train/loss": 1.0})  # imitation
    assert caplog.text == ""


def test_once_until_it_was_otherwise(caplog):
    nothing_learned(run_after(**{ADVANTAGE: 0.0}), 4, NOTHING)
    assert caplog.text == ""
    nothing_learned(run_after(**{ADVANTAGE: 0.1}), 5, NOTHING)
    assert "step 6" in caplog.text


def test_it_is_heard_through_the_hook(caplog):
    load_plugins().hook.miles_on_train_step_end(run=run_after(), step=0, metrics=NOTHING)
    assert "step 1: all advantages are 0" in caplog.text
