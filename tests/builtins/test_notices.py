"""What a run says when it cannot learn."""

from types import SimpleNamespace

import pytest

from miles.builtins.notices import nothing_to_compare
from miles.config import Config
from miles.plugins import load_plugins
from miles.rollout.measure import batch_metrics
from miles.types import Group, Prompt, Sample, Status

PROMPT = Prompt(id="s:0", task_set="s", text="x", tokens=[1])


def groups_of(*rewards):
    made = []
    for group_id, those in enumerate(rewards):
        samples = [Sample.begin(PROMPT, id=i, group_id=group_id) for i in range(len(those))]
        for sample, reward in zip(samples, those, strict=True):
            sample.reward, sample.status = reward, Status.COMPLETED
        made.append(Group(group_id, PROMPT, samples))
    return made


def run_at(step, **metrics):
    return SimpleNamespace(config=Config(), step=step, metrics=metrics)


@pytest.mark.parametrize(
    ("rewards", "warned"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], True),
        ([[0.0, 0.0], [1.0, 1.0]], True),
        ([[0.0, 1.0], [1.0, 1.0]], False),
        ([[0.0], [1.0]], False),  # nothing is compared within a prompt
    ],
)
def test_a_batch_without_differences_is_warned_of(caplog, rewards, warned):
    groups = groups_of(*rewards)
    nothing_to_compare(run_at(4), groups, batch_metrics(groups))
    assert ("step 5: the samples of each prompt all got the same reward" in caplog.text) is warned
    assert ("rollouts/step_000005.jsonl" in caplog.text) is warned


def test_once_until_it_was_otherwise(caplog):
    groups = groups_of([1.0, 1.0])
    nothing_to_compare(run_at(4, **{"rollout/groups_agreeing": 1.0}), groups, batch_metrics(groups))
    assert caplog.text == ""
    nothing_to_compare(run_at(5, **{"rollout/groups_agreeing": 0.9}), groups, batch_metrics(groups))
    assert "(1 on average)" in caplog.text


def test_imitation_compares_nothing(caplog):
    run = run_at(0)
    run.config = Config.model_validate({"algorithm": {"advantage_estimator": "none"}})
    nothing_to_compare(run, groups_of([1.0, 1.0]), {"rollout/groups_agreeing": 1.0, "rollout/reward": 1.0})
    assert caplog.text == ""


def test_it_is_heard_through_the_hook(caplog):
    groups = groups_of([0.0, 0.0])
    load_plugins().hook.miles_on_rollout_end(run=run_at(0), step=0, groups=groups, metrics=batch_metrics(groups))
    assert "step 1: the samples of each prompt" in caplog.text


def test_samples_that_are_compared_with_a_baseline_may_agree(caplog):
    groups = groups_of([1.0, 1.0])
    groups[0].baseline_reward = 0.0
    nothing_to_compare(run_at(0), groups, batch_metrics(groups))
    assert caplog.text == ""
