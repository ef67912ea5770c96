"""Estimators that are wrong in one way each."""

import torch

from miles.api import Advantages
from miles.testing import AdvantageEstimatorContract
from miles.testing.batches import rollout_batch


def spread(values_N, inputs):
    """One value a sample on its trainable tokens, float32."""
    lengths = torch.tensor(inputs.bounds).diff()
    return values_N.float().repeat_interleave(lengths) * inputs.mask_T


def baseline(inputs, once=True):
    """Mean reward of each sample's group, by dictionary: an independent way to say it."""
    means = []
    for group in inputs.group_N.tolist():
        rewards = {}
        for i, (g, r) in enumerate(zip(inputs.group_N.tolist(), inputs.rewards_N.tolist(), strict=True)):
            if g == group:
                rewards[inputs.rollout_N[i].item() if once else i] = r
        means.append(sum(rewards.values()) / len(rewards))
    return torch.tensor(means, dtype=torch.float64)


def right(inputs):
    return spread(inputs.rewards_N - baseline(inputs), inputs)


def in_place(inputs):
    inputs.rewards_N -= inputs.rewards_N.mean()
    return right(inputs)


class Growing:
    calls = 0

    def __call__(self, inputs):
        self.calls += 1
        return right(inputs) * self.calls


def rank_by_place(inputs):
    return spread(torch.arange(len(inputs.rewards_N)) + inputs.rewards_N, inputs)


def group_number_as_index(inputs):
    return spread(inputs.rewards_N - inputs.group_N, inputs)


def unguarded_std(inputs):
    return right(inputs) / inputs.rewards_N.var(correction=0).sqrt().float()


def of(function):
    return lambda: function


def test_a_right_one_passes(passes):
    passes(AdvantageEstimatorContract, of(right))
    passes(AdvantageEstimatorContract, of(lambda inputs: Advantages(right(inputs), metrics={"mean": 0.5})))


def test_wrong_ones_are_caught(catches):
    lengths = lambda inputs: torch.tensor(inputs.bounds).diff()  # noqa: E731
    catches(
        AdvantageEstimatorContract,
        {
            "test_one_float_for_each_token": [
                of(lambda inputs: inputs.rewards_N.float()),
                of(lambda inputs: right(inputs).double()),
                of(lambda inputs: right(inputs).requires_grad_()),
                of(lambda inputs: Advantages(right(inputs), returns_T=torch.zeros(3))),
            ],
            "test_zero_where_the_mask_is": [
                of(lambda inputs: (inputs.rewards_N - baseline(inputs)).float().repeat_interleave(lengths(inputs))),
            ],
            "test_rewards_matter": [of(lambda inputs: inputs.mask_T.clone())],
            "test_a_better_reward_is_no_worse": [
                of(lambda inputs: -right(inputs)),
                of(lambda inputs: right(inputs).abs()),
            ],
            "test_its_inputs_are_left_alone": [of(in_place)],
            "test_the_same_answer_twice": [Growing, of(lambda inputs: right(inputs) + torch.rand(1))],
            "test_the_order_of_samples_does_not_matter": [
                of(rank_by_place),
                of(lambda inputs: right(inputs).cumsum(0)),
            ],
            "test_numbers_of_groups_and_trajectories_are_only_names": [of(group_number_as_index)],
            "test_siblings_count_once": [
                of(lambda inputs: spread(inputs.rewards_N - baseline(inputs, once=False), inputs)),
                of(lambda inputs: spread(inputs.rewards_N - inputs.rewards_N.mean(), inputs)),
            ],
            "test_degenerate_batches_are_finite": [
                of(unguarded_std),
                of(lambda inputs: right(inputs) / right(inputs).abs().max()),
            ],
            "test_optional_inputs_it_does_not_need_may_be_absent": [
                of(lambda inputs: right(inputs) - inputs.values_T),
                of(lambda inputs: right(inputs) - 0.1 * inputs.kl_T),
            ],
            "test_metrics_are_numbers": [
                of(lambda inputs: Advantages(right(inputs), metrics={"mean": inputs.rewards_N.mean()}))
            ],
        },
    )


def test_what_it_needs_is_there(passes):
    teacher = lambda inputs: (inputs.teacher_log_probs_T - inputs.old_log_probs_T) * inputs.mask_T  # noqa: E731
    passes(AdvantageEstimatorContract, of(teacher), says={"needs": {"teacher"}})


def test_the_sample_batch_is_what_it_says():
    batch = rollout_batch()
    assert len(batch.rewards_N) == 7
    assert batch.bounds[-1] == len(batch.mask_T) == 7 * 2 + 21
    assert batch.mask_T[:2].tolist() == [0, 0]
    assert batch.mask_T[5:12].tolist() == [0, 0, 1, 1, 1, 0, 1]  # prompt of 2; its 4th is the world's
