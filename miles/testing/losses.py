"""The contracts of policy losses, of loss masks and of importance-sampling corrections."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from miles.testing.batches import copied, loss_batch, padded, rollout_batch, select, unchanged
from miles.testing.contract import ComponentContract
from miles.types import Correction, LossInputs, PolicyLoss

FAR = (-50.0, -20.0, -1.0, 0.0, 1.0, 20.0, 50.0)
"""Log-ratios: a policy that has collapsed, or two engines that disagree, are that far apart."""


class PolicyLossContract(ComponentContract):
    """`(LossInputs) -> PolicyLoss`, per token.

    Example:
        class TestPpoClip(PolicyLossContract):
            name = "ppo_clip"
    """

    kind = "policy_losses"

    def inputs(self) -> LossInputs:
        """A micro-batch; override it for a loss that needs more, such as `outputs` with logits or its own columns."""
        return loss_batch()

    def on_policy_gradient(self, inputs: LossInputs) -> Tensor:
        """d loss_t / d log_prob_t where old and new policy agree: -A for whatever is a policy gradient."""
        return -inputs.advantages_T

    def result(self, inputs: LossInputs) -> PolicyLoss:
        result = self.build()(inputs)
        assert isinstance(result, PolicyLoss), f"returned {type(result).__name__}, not a PolicyLoss"
        return result

    def gradient(self, inputs: LossInputs) -> Tensor:
        inputs = replace(inputs, log_probs_T=inputs.log_probs_T.detach().clone().requires_grad_())
        (self.result(inputs).loss_T * inputs.mask_T).sum().backward()
        assert inputs.log_probs_T.grad is not None, "no gradient reaches log_probs_T"
        return inputs.log_probs_T.grad

    def test_one_number_for_each_token(self) -> None:
        """The core masks, corrects and averages: a loss that averages itself would count the mask, and the number of
        ranks, twice."""
        inputs = self.inputs()
        result = self.result(inputs)
        for name, values_T in {"loss_T": result.loss_T, **result.metrics_T}.items():
            assert values_T.shape == inputs.log_probs_T.shape, f"{name} has shape {tuple(values_T.shape)}"

    def test_the_gradient_reaches_the_log_probs(self) -> None:
        """A loss computed from detached numbers trains nothing, and looks like one that works."""
        inputs = self.inputs()
        gradient_T = self.gradient(inputs)
        assert gradient_T[inputs.mask_T > 0].abs().sum() > 0

    def test_on_policy_it_is_the_policy_gradient(self) -> None:
        """Where nothing is clipped yet, every such loss is the score function's: a sign or a factor that is off is seen
        here and nowhere else. A loss that is meant to differ declares its `on_policy_gradient`."""
        inputs = self.inputs()
        inputs = replace(inputs, log_probs_T=inputs.old_log_probs_T.clone())
        trained = inputs.mask_T > 0
        expected_T = self.on_policy_gradient(inputs)
        torch.testing.assert_close(self.gradient(inputs)[trained], expected_T[trained], atol=1e-5, rtol=1e-4)

    def test_finite_however_far_the_policies_are_apart(self) -> None:
        """exp(50) squared is more than float32 holds, and one infinity makes every weight NaN."""
        for sign in (1.0, -1.0):
            inputs = self.inputs()
            far_T = torch.tensor(FAR).repeat(len(inputs.mask_T))[: len(inputs.mask_T)]
            new_T = inputs.old_log_probs_T + far_T
            inputs = replace(inputs, log_probs_T=new_T, advantages_T=torch.full_like(new_T, sign))
            assert self.result(inputs).loss_T.isfinite().all(), f"loss at log-ratios {FAR}, A = {sign}"
            assert self.gradient(inputs).isfinite().all(), f"gradient at log-ratios {FAR}, A = {sign}"

    def test_packing_changes_nothing(self) -> None:
        """The loss of samples packed together is that of each alone, one after the other: else results would depend
        on the memory of the machine."""
        inputs = self.inputs()
        alone = [self.result(select(inputs, [i])).loss_T for i in range(len(inputs.bounds) - 1)]
        torch.testing.assert_close(self.result(inputs).loss_T.detach(), torch.cat(alone).detach())

    def test_without_samples_there_is_no_loss(self) -> None:
        """A rank whose share is smaller than the others' gets an empty micro-batch, and must still take part."""
        assert self.result(select(self.inputs(), [])).loss_T.shape == (0,)

    def test_metrics_are_detached(self) -> None:
        """A metric that carries a graph keeps the whole forward pass in memory."""
        attached = [name for name, value_T in self.result(self.inputs()).metrics_T.items() if value_T.requires_grad]
        assert attached == []

    def test_its_inputs_are_left_alone(self) -> None:
        """KL, entropy and other terms read the same tensors after it; the same inputs give the same loss."""
        built, inputs = self.build(), self.inputs()
        before = copied(inputs)
        first, again = built(inputs), built(inputs)
        assert unchanged(before, inputs), "a tensor of the inputs was changed in place"
        assert torch.equal(first.loss_T, again.loss_T), "the same inputs gave two losses"


class LossMaskContract(ComponentContract):
    """`(LossInputs) -> keep_T`, bool or 0 and 1.

    Example:
        class TestOpsm(LossMaskContract):
            name = "opsm"
    """

    kind = "loss_masks"

    def inputs(self, far: float = 0.1) -> LossInputs:
        """A micro-batch whose log-ratios new / old are up to `far`, with advantages of either sign; override it for a
        mask that needs more, such as its own columns."""
        inputs = loss_batch()
        pattern_T = torch.tensor(FAR).repeat(len(inputs.mask_T))[: len(inputs.mask_T)] / max(FAR)
        return replace(inputs, log_probs_T=(inputs.old_log_probs_T + far * pattern_T).requires_grad_())

    def kept(self, inputs: LossInputs) -> Tensor:
        keep_T = self.build()(inputs)
        assert isinstance(keep_T, Tensor), f"returned {type(keep_T).__name__}, not a tensor"
        return keep_T

    def test_one_yes_or_no_for_each_token(self) -> None:
        """A mask of another shape is broadcast, and one with other values is a weight that nobody asked for."""
        for far in (0.1, 50.0, 1000.0):
            inputs = self.inputs(far)
            keep_T = self.kept(inputs)
            assert keep_T.shape == inputs.log_probs_T.shape
            assert ((keep_T == 0) | (keep_T == 1)).all(), f"values other than 0 and 1 at log-ratios of {far}"

    def test_it_is_no_part_of_the_graph(self) -> None:
        """A mask is a decision, not something to be trained."""
        assert not self.kept(self.inputs()).requires_grad, "detach it"

    def test_on_policy_everything_counts(self) -> None:
        """Where old and new policy agree there is nothing to be careful about: the first step on fresh samples must be
        the one without a mask."""
        inputs = self.inputs()
        keep_T = self.kept(replace(inputs, log_probs_T=inputs.old_log_probs_T.clone()))
        assert (keep_T[inputs.mask_T > 0] == 1).all()

    def test_off_policy_something_is_left_out(self) -> None:
        """A mask that keeps all of a batch, however the policies and the signs of advantages differ, is none."""
        inputs = self.inputs(50.0)
        trained = inputs.mask_T > 0
        old_T, shift_T = inputs.old_log_probs_T, torch.full_like(inputs.mask_T, 5.0)
        dropped = [
            (self.kept(replace(inputs, log_probs_T=new_T, advantages_T=sign * torch.ones_like(new_T))) == 0)[trained]
            for new_T in (inputs.log_probs_T.detach(), old_T + shift_T, old_T - shift_T)
            for sign in (1.0, -1.0)
        ]
        assert torch.cat(dropped).any(), "every token is kept"

    def test_packing_changes_nothing(self) -> None:
        """What is decided of a sample does not depend on what else is in the micro-batch."""
        inputs = self.inputs(5.0)
        alone = [self.kept(select(inputs, [i])) for i in range(len(inputs.bounds) - 1)]
        assert torch.equal(self.kept(inputs).float(), torch.cat(alone).float())

    def test_without_samples_there_is_no_mask(self) -> None:
        """A rank whose share is smaller than the others' gets an empty micro-batch, and must still take part."""
        assert self.kept(select(self.inputs(), [])).shape == (0,)

    def test_a_pad_is_no_sample(self) -> None:
        """A micro-batch may be longer than its samples; the mask is as long as the micro-batch."""
        inputs = self.inputs(5.0)
        assert torch.equal(self.kept(padded(inputs))[: inputs.bounds[-1]], self.kept(inputs))

    def test_tokens_without_a_loss_have_no_say(self) -> None:
        """Log-probabilities of the environment's tokens are no policy's: a sequence's mean must leave them out."""
        inputs = self.inputs(5.0)
        noisy_T = torch.where(inputs.mask_T > 0, inputs.log_probs_T, inputs.log_probs_T - 30)
        one, other = self.kept(inputs), self.kept(replace(inputs, log_probs_T=noisy_T))
        assert torch.equal(one[inputs.mask_T > 0], other[inputs.mask_T > 0])

    def test_its_inputs_are_left_alone(self) -> None:
        """The loss and other masks read the same tensors; the same inputs give the same mask."""
        built, inputs = self.build(), self.inputs()
        before = copied(inputs)
        first, again = built(inputs), built(inputs)
        assert unchanged(before, inputs), "a tensor of the inputs was changed in place"
        assert torch.equal(first, again), "the same inputs gave two masks"


class ISCorrectionContract(ComponentContract):
    """`(train_log_probs_T, rollout_log_probs_T, mask_T, bounds) -> Correction`.

    Example:
        class TestTis(ISCorrectionContract):
            name = "tis"
    """

    kind = "is_corrections"

    def correct(self, train_T: Tensor, rollout_T: Tensor, mask_T: Tensor, bounds: list[int]) -> Correction:
        result = self.build()(train_T, rollout_T, mask_T, bounds)
        assert isinstance(result, Correction), f"returned {type(result).__name__}, not a Correction"
        return result

    def sample(self, far: float = 0.1) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Arguments of a correction whose log-ratios are up to `far`."""
        batch = rollout_batch()
        assert batch.old_log_probs_T is not None
        pattern_T = torch.tensor(FAR).repeat(len(batch.mask_T))[: len(batch.mask_T)] / max(FAR)
        return batch.old_log_probs_T, batch.old_log_probs_T - far * pattern_T * batch.mask_T, batch.mask_T, batch.bounds

    def test_one_number_for_each_token(self) -> None:
        """Weights multiply the per-token loss: of another shape they would be broadcast. One of the two is given."""
        arguments = self.sample()
        found = self.correct(*arguments)
        given = [values_T for values_T in (found.weights_T, found.keep_T) if values_T is not None]
        assert given, "neither weights_T nor keep_T"
        for values_T in given:
            assert values_T.shape == arguments[0].shape
            assert not values_T.requires_grad, "weights are constants of the loss: detach them"

    def test_no_mismatch_no_correction(self) -> None:
        """Where trainer and engine agree, the run must be the one without a correction."""
        same_T, _, mask_T, bounds = self.sample()
        found = self.correct(same_T, same_T.clone(), mask_T, bounds)
        trained = mask_T > 0
        for name, values_T in (("weights_T", found.weights_T), ("keep_T", found.keep_T)):
            if values_T is not None:
                torch.testing.assert_close(values_T[trained].float(), torch.ones(int(trained.sum())), msg=name)

    def test_a_mismatch_is_corrected(self) -> None:
        """A correction that changes nothing where the two are 50 nats apart is none."""
        far = self.correct(*self.sample(far=50.0))
        touched = [v for v in (far.weights_T, far.keep_T) if v is not None and (v.float() != 1).any()]
        assert touched, "all weights are 1 and all tokens are kept"

    def test_what_was_drawn_too_often_counts_no_more(self) -> None:
        """The weight is trainer over rollout: turned round, it makes the mismatch worse instead of better."""
        train_T, _, mask_T, bounds = self.sample()
        weights_T = self.correct(train_T, train_T + 0.1, mask_T, bounds).weights_T
        if weights_T is not None:
            assert (weights_T[mask_T > 0] <= 1 + 1e-4).all(), "the rollout says too much, and weights are above 1"

    def test_finite_however_far_the_policies_are_apart(self) -> None:
        """A token of probability 0 in one of the two is what corrections are for."""
        for far in (1.0, 50.0, -50.0, 1000.0):
            found = self.correct(*self.sample(far))
            for name, values_T in (("weights_T", found.weights_T), ("keep_T", found.keep_T)):
                assert values_T is None or values_T.isfinite().all(), f"{name} at log-ratios of {far}"
            bad = {name: value for name, value in found.metrics.items() if not torch.tensor(value).isfinite()}
            assert bad == {}, f"metrics at log-ratios of {far}"

    def test_weights_are_not_negative_and_keep_is_a_mask(self) -> None:
        """A negative weight would train towards what was bad."""
        found = self.correct(*self.sample(far=50.0))
        assert found.weights_T is None or (found.weights_T >= 0).all()
        assert found.keep_T is None or ((found.keep_T == 0) | (found.keep_T == 1)).all()

    def test_samples_are_corrected_one_by_one(self) -> None:
        """What happened to one trajectory says nothing of another. A correction that normalises over the batch skips
        this, and says so."""
        train_T, rollout_T, mask_T, bounds = self.sample(far=5.0)
        whole = self.correct(train_T, rollout_T, mask_T, bounds)
        for start, end in pairwise(bounds):
            alone = self.correct(train_T[start:end], rollout_T[start:end], mask_T[start:end], [0, end - start])
            for found_T, expected_T in ((alone.weights_T, whole.weights_T), (alone.keep_T, whole.keep_T)):
                if found_T is not None and expected_T is not None:
                    torch.testing.assert_close(found_T, expected_T[start:end])

    def test_tokens_without_a_loss_have_no_say(self) -> None:
        """Log-probabilities of the environment's tokens are no policy's: a sequence ratio must leave them out."""
        train_T, rollout_T, mask_T, bounds = self.sample(far=1.0)
        noisy_T = torch.where(mask_T > 0, rollout_T, rollout_T - 3)
        one, other = (self.correct(train_T, r_T, mask_T, bounds) for r_T in (rollout_T, noisy_T))
        for a_T, b_T in ((one.weights_T, other.weights_T), (one.keep_T, other.keep_T)):
            if a_T is not None and b_T is not None:
                torch.testing.assert_close(a_T[mask_T > 0], b_T[mask_T > 0])

    def test_its_inputs_are_left_alone(self) -> None:
        """Log-probabilities of the rollout are logged and compared after it."""
        arguments = self.sample()
        before = [values_T.clone() for values_T in arguments[:3]]
        self.correct(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(before, arguments[:3], strict=True))

    def test_metrics_are_numbers(self) -> None:
        """Trackers write numbers; a tensor would hold on to the batch."""
        for name, value in self.correct(*self.sample()).metrics.items():
            assert isinstance(value, int | float), f"{name} is a {type(value).__name__}"
