"""The contract of advantage estimators, and of advantage terms, which are the same kind."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from miles.testing.batches import copied, cut_in_two, rollout_batch, select, unchanged
from miles.testing.contract import ComponentContract
from miles.types import AdvantageInputs, Advantages

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


class AdvantageEstimatorContract(ComponentContract):
    """`(AdvantageInputs) -> advantages_T`, or `Advantages`.

    Example:
        class TestGrpo(AdvantageEstimatorContract):
            name = "grpo"
    """

    kind = "advantage_estimators"

    def advantages(self, inputs: AdvantageInputs) -> Tensor:
        return self.result(inputs).advantages_T

    def result(self, inputs: AdvantageInputs) -> Advantages:
        result: Any = self.build()(inputs)
        return Advantages(result) if isinstance(result, Tensor) else result

    def test_one_float_for_each_token(self) -> None:
        """`[T]` float32: anything else is broadcast against the tokens, which trains on the wrong ones."""
        inputs = rollout_batch()
        for name, values_T in vars(self.result(inputs)).items():
            if isinstance(values_T, Tensor):
                assert values_T.shape == inputs.mask_T.shape, f"{name} has shape {tuple(values_T.shape)}"
                assert values_T.dtype == torch.float32, f"{name} is {values_T.dtype}"
                assert not values_T.requires_grad, f"{name} carries a gradient"

    def test_zero_where_the_mask_is(self) -> None:
        """Prompt and environment tokens were not the model's choice: nothing may be learnt from them."""
        inputs = rollout_batch()
        assert (self.advantages(inputs)[inputs.mask_T == 0] == 0).all()

    def test_rewards_matter(self) -> None:
        """An estimator that says the same of every trajectory teaches nothing. (A term has no rewards, but columns.)"""
        advantages_T = self.advantages(rollout_batch())
        assert advantages_T.unique().numel() > 2

    def test_a_better_reward_is_no_worse(self) -> None:
        """A sign that is off makes the policy unlearn whatever was rewarded. (For a term, nothing changes.)"""
        inputs = rollout_batch()
        expected_T = self.advantages(inputs)
        for sample, (start, end) in enumerate(pairwise(inputs.bounds)):
            rewards_N = inputs.rewards_N.clone()
            rewards_N[sample] += 0.5
            better_T = self.advantages(replace(inputs, rewards_N=rewards_N))
            gain = float((better_T - expected_T)[start:end].sum())
            assert gain >= -1e-4, f"sample {sample} was paid more, and its advantages fell by {-gain:.3g}"

    def test_its_inputs_are_left_alone(self) -> None:
        """The batch is logged, and read by other components, after it."""
        inputs = rollout_batch()
        before = copied(inputs)
        self.advantages(inputs)
        assert unchanged(before, inputs), "a tensor of the inputs was changed in place"

    def test_the_same_answer_twice(self) -> None:
        """A resumed run recomputes advantages: no random numbers, no state between calls."""
        built, inputs = self.build(), rollout_batch()
        first, _, again = (built(batch) for batch in (inputs, rollout_batch(seed=1), inputs))
        tensors = [r if isinstance(r, Tensor) else r.advantages_T for r in (first, again)]
        assert torch.equal(*tensors)

    def test_the_order_of_samples_does_not_matter(self) -> None:
        """Samples come in the order in which they finished; that is chance."""
        inputs, order = rollout_batch(), [5, 2, 0, 6, 3, 1, 4]
        expected_T = select(replace(inputs, ref_log_probs_T=self.advantages(inputs)), order).ref_log_probs_T
        torch.testing.assert_close(self.advantages(select(inputs, order)), expected_T, **CLOSE)

    def test_numbers_of_groups_and_trajectories_are_only_names(self) -> None:
        """Numbers grow all through a run, and come in any order."""
        inputs = rollout_batch()
        renamed = replace(inputs, group_N=10**12 - inputs.group_N, rollout_N=10**12 - inputs.rollout_N)
        torch.testing.assert_close(self.advantages(renamed), self.advantages(inputs), **CLOSE)

    def test_siblings_count_once(self) -> None:
        """A trajectory that was cut in two is still one: the advantages of the others must not move."""
        inputs = rollout_batch()
        expected_T = self.advantages(inputs)
        for sample in (0, 3):  # sample 0 differs from its group, 3 agrees with it
            found_T = self.advantages(cut_in_two(inputs, sample, at=4))
            others = torch.ones_like(found_T, dtype=torch.bool)
            others[inputs.bounds[sample] : inputs.bounds[sample + 1]] = False
            torch.testing.assert_close(found_T[others], expected_T[others], **CLOSE)

    def test_degenerate_batches_are_finite(self) -> None:
        """A group of one, rewards that all agree, no trainable token, no sample: such batches come, and one NaN in an
        advantage is a NaN in every weight."""
        batches = {
            "groups of one": rollout_batch(groups=range(7)),
            "rewards that agree": rollout_batch(rewards=[0.1] * 7),
            "rewards that nearly agree": rollout_batch(rewards=[0.1, 0.1 + 1e-7] * 3 + [0.1]),
            "huge rewards": rollout_batch(rewards=[1e6, -1e6] * 3 + [0.0]),
            "no trainable token": rollout_batch(responses=[0] * 7),
            "one sample": rollout_batch([1.0], [0], [3]),
            "no sample": rollout_batch([], [], []),
        }
        for what, inputs in batches.items():
            advantages_T = self.advantages(inputs)
            assert advantages_T.shape == inputs.mask_T.shape, what
            assert advantages_T.isfinite().all(), what

    def test_optional_inputs_it_does_not_need_may_be_absent(self) -> None:
        """The core computes only what a component says it `needs`."""
        given = {
            "reference": ("ref_log_probs_T",),
            "critic": ("values_T",),
            "teacher": ("teacher_log_probs_T",),
            "greedy_rollout": ("baseline_rewards_N",),
            "rollout_log_probs": ("rollout_log_probs_T",),
            "kl": ("kl_T",),
        }
        needs = self.component.needs
        absent: dict[str, Any] = {
            field: None for need, fields in given.items() if need not in needs for field in fields
        }
        inputs = replace(rollout_batch(), **absent)
        assert self.advantages(inputs).shape == inputs.mask_T.shape

    def test_metrics_are_numbers(self) -> None:
        """Trackers write numbers; a tensor would hold on to the batch."""
        for name, value in self.result(rollout_batch()).metrics.items():
            assert isinstance(value, int | float), f"{name} is a {type(value).__name__}"
