"""ReMax by hand, what must not change it, and through a run's own advantage stage."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_remax.plugin import miles_configure
from miles_remax.remax import remax

from miles.api import ConfigError, Group, Prompt, Sample, Status, TrainError
from miles.config import Config
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.testing.batches import rollout_batch, select
from miles.training.advantages import AdvantageStage
from miles.training.table import Table


def batch_of(rewards, baselines, groups=None, responses=None):
    count = len(rewards)
    batch = rollout_batch(rewards, groups or range(count), responses or [1] * count)
    return replace(batch, baseline_rewards_N=torch.tensor(baselines, dtype=torch.float64))


def advantages_of(*args, **kwargs):
    """One value a sample, from samples of one trainable token."""
    batch = batch_of(*args, **kwargs)
    return remax(batch)[batch.mask_T > 0].tolist()


def test_by_hand():
    assert advantages_of([1.0, 0.0, 0.25, -2.0], [0.5, 0.5, 0.25, 1.0]) == [0.5, -0.5, 0.0, -3.0]


def test_on_every_trainable_token_and_on_no_other():
    batch = batch_of(
        [2.0, 0.5], [0.5, 1.0], responses=[5, 2]
    )  # two prompt tokens each; the fourth is the environment's
    assert remax(batch).tolist() == [0, 0, 1.5, 1.5, 1.5, 0, 1.5, 0, 0, -0.5, -0.5]


def test_a_group_of_one_and_one_that_agrees_learn_from_their_baseline():
    assert advantages_of([1.0], [0.0]) == [1.0]
    assert advantages_of([1.0, 1.0], [0.0, 0.0], groups=[3, 3]) == [1.0, 1.0]
    assert advantages_of([1.0, 1.0], [1.0, 1.0], groups=[3, 3]) == [0.0, 0.0]


def test_siblings_of_one_trajectory_share_its_advantage():
    batch = replace(batch_of([1.0, 1.0, 0.0], [0.5] * 3, groups=[0] * 3), rollout_N=torch.tensor([7, 7, 8]))
    assert remax(batch)[batch.mask_T > 0].tolist() == [0.5, 0.5, -0.5]


def test_samples_without_a_trainable_token_are_zero_and_finite():
    assert remax(batch_of([1e6, -1e6], [-1e6, 1e6], responses=[0, 0])).tolist() == [0] * 4
    assert remax(batch_of([], [])).tolist() == []


@pytest.mark.parametrize("shift", [50.0, -50.0])
def test_log_probabilities_have_no_say(shift):
    batch = rollout_batch()
    far = replace(batch, old_log_probs_T=batch.old_log_probs_T + shift, ref_log_probs_T=None, kl_T=None)
    assert torch.equal(remax(far), remax(batch))


def test_a_batch_without_baselines_is_refused():
    with pytest.raises(TrainError, match=r"no baseline rewards \(Group.baseline_reward\)"):
        remax(replace(rollout_batch(), baseline_rewards_N=None))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_neither_order_nor_packing_nor_other_samples_matter(data):
    count = data.draw(st.integers(1, 10))
    numbers = st.lists(st.floats(-10, 10), min_size=count, max_size=count)
    rewards, baselines = data.draw(numbers), data.draw(numbers)
    responses = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))]
    some = select(batch_of(rewards, baselines, responses=responses), order)
    expected = torch.zeros_like(some.mask_T)
    for place, i in enumerate(order):
        expected[some.bounds[place] : some.bounds[place + 1]] = rewards[i] - baselines[i]
    torch.testing.assert_close(remax(some), expected * some.mask_T, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- in the whole stage


def table_of(*groups):
    """Groups of (baseline reward, rewards), samples of one prompt token and two of response."""
    made, number = [], 0
    for g, (baseline, rewards) in enumerate(groups):
        prompt = Prompt(f"s:{g}", "s", text="?", tokens=[1])
        samples = []
        for reward in rewards:
            sample = Sample.begin(prompt, id=number, group_id=g)
            sample.append([2, 3])
            sample.columns["loss_mask"][1:] = 1
            sample.reward, sample.status = reward, Status.COMPLETED
            samples.append(sample)
            number += 1
        made.append(Group(g, prompt, samples, baseline_reward=baseline))
    return Table.from_groups(made)


@pytest.fixture(scope="module")
def stage():
    config = Config(algorithm={"advantage_estimator": "remax"})
    return AdvantageStage(config, Registry(load_plugins()))


def test_baselines_of_groups_reach_their_samples(stage):
    table = table_of((0.5, [1.0, 0.0]), (1.0, [1.0]))
    stage(table)
    assert [a.tolist() for a in table.columns["advantages"]] == [[0, 0.5, 0.5], [0, -0.5, -0.5], [0, 0, 0]]


def test_one_group_without_a_baseline_is_an_error(stage):
    with pytest.raises(TrainError, match="advantage estimator 'remax'.*no baseline rewards"):
        stage(table_of((0.5, [1.0]), (None, [1.0])))


def test_a_baseline_that_is_no_number_is_an_error(stage):
    with pytest.raises(TrainError, match="not finite"):
        stage(table_of((float("nan"), [1.0])))


def test_a_filter_that_drops_what_it_learns_from_is_refused():
    def configured(estimator, *filters):
        algorithm, rollout = {"advantage_estimator": estimator}, {"filters": filters}
        miles_configure(Config.model_validate({"algorithm": algorithm, "rollout": rollout}))

    configured("remax")
    configured("grpo", "agreeing_rewards")
    with pytest.raises(ConfigError, match=r"rollout\.filters: agreeing_rewards drops"):
        configured("remax", "agreeing_rewards")
