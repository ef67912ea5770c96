"""Train backends that are wrong in one way each: the built-in one with a mistake."""

from dataclasses import replace

import pytest
import torch

from miles.api import LossResult
from miles.builtins.fsdp.backend import FsdpBackend
from miles.testing import TrainBackendContract

pytest.importorskip("miles_llama")


def but(**methods):
    wrong = type("Wrong", (FsdpBackend,), methods)
    return None, {"build": lambda self, **options: wrong(context=self.context())}


def outputs(change):
    """`forward` with its outputs changed."""

    def forward(self, batches, want):
        found = FsdpBackend.forward(self, batches, want)
        for one in found:
            change(self, one)
        return found

    return but(forward=forward)


def set_log_probs(function):
    def change(self, found):
        found.log_probs_T = function(found.log_probs_T)

    return outputs(change)


def one_long_sample(self, batches, want):
    joined = [replace(batch, bounds=[0, batch.bounds[-1]]) if len(batch) else batch for batch in batches]
    return FsdpBackend.forward(self, joined, want)


def loss_of(change):
    """`forward_backward` whose loss sees other outputs."""

    def forward_backward(self, batches, loss, *want):
        def wrapped(batch, found):
            return loss(batch, replace(found, log_probs_T=change(found.log_probs_T)))

        return FsdpBackend.forward_backward(self, batches, wrapped, *want)

    return but(forward_backward=forward_backward)


def averaging(self, batches, loss, *want):
    def share(batch, found):
        result = loss(batch, found)
        return LossResult(result.loss / len(batches), result.sums)

    return FsdpBackend.forward_backward(self, batches, share, *want)


def mean_of_sums(self, batches, loss, *want):
    sums = FsdpBackend.forward_backward(self, batches, loss, *want)
    return {name: value / len(batches) for name, value in sums.items()}


def forgetting(self, batches, loss, *want):
    FsdpBackend.zero_grad(self)
    return FsdpBackend.forward_backward(self, batches, loss, *want)


def no_empty_ones(self, batches, *rest):
    return FsdpBackend.forward_backward(self, batches if len(batches[0]) else [None], *rest)


def report_of(**fields):
    return lambda self: replace(FsdpBackend.optim_step(self), **fields)


def repairs_nan(self):
    for parameter in self.scorer.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_()
    self.loss_total = torch.zeros(())
    return FsdpBackend.optim_step(self)


def stands_still(self):
    kept = [p.detach().clone() for p in self.scorer.parameters()]
    report = FsdpBackend.optim_step(self)
    with torch.no_grad():
        for parameter, old in zip(self.scorer.parameters(), kept, strict=True):
            parameter.copy_(old)
    return report


def prefixed(self):
    for group in FsdpBackend.named_weights(self):
        yield {f"module.{name}": tensor for name, tensor in group.items()}


def rounded(self):
    for group in FsdpBackend.named_weights(self):
        yield {name: tensor.bfloat16().float() for name, tensor in group.items()}


def takes_rounded(self, groups):
    coarse = [{name: tensor.bfloat16().float() for name, tensor in group.items()} for group in groups]
    FsdpBackend.take_weights(self, coarse)


def forgiving_load(self, directory, weights_only=False):
    if directory.exists():
        FsdpBackend.load(self, directory, weights_only)


def drops_gradients(self, parts):
    FsdpBackend.zero_grad(self)
    FsdpBackend.offload(self, parts)


def reference_noise(self, found):
    if self.context.role == "reference":
        found.log_probs_T = found.log_probs_T + 0.1


def cold(self, batches, want):
    self.scorer.temperature = 1.0
    found = FsdpBackend.forward(self, batches, want)
    return [replace(one, log_probs_T=one.log_probs_T * self.context.temperature) for one in found]


def halve_entropy(self, found):
    found.entropy_T = None if found.entropy_T is None else found.entropy_T / 2


def test_wrong_ones_are_caught(catches):
    catches(
        TrainBackendContract,
        {
            "test_log_probs_are_the_models": [
                set_log_probs(lambda values_T: values_T.roll(1)),
                set_log_probs(lambda values_T: values_T - 1.0),
                but(forward=one_long_sample),
            ],
            "test_the_temperature_divides_the_logits": [but(forward=cold)],
            "test_entropy_is_of_the_whole_distribution": [outputs(halve_entropy)],
            "test_training_sees_the_log_probs_of_forward": [
                loss_of(lambda values_T: values_T * 1.01),
                loss_of(lambda values_T: values_T.detach()),
            ],
            "test_gradients_do_not_depend_on_micro_batches": [but(forward_backward=averaging)],
            "test_sums_are_summed_over_micro_batches": [but(forward_backward=mean_of_sums)],
            "test_gradients_accumulate_until_they_are_zeroed": [
                but(forward_backward=forgetting),
                but(zero_grad=lambda self: None),
            ],
            "test_a_step_learns": [but(optim_step=stands_still), but(optim_step=report_of(learning_rate=0.0))],
            "test_a_gradient_that_is_not_finite_skips_the_step": [
                but(optim_step=repairs_nan),
                but(optim_step=report_of(skipped=False)),
            ],
            "test_an_empty_micro_batch_takes_part": [but(forward_backward=no_empty_ones)],
            "test_it_takes_the_weights_of_another": [
                but(take_weights=lambda self, groups: None),
                but(take_weights=takes_rounded),
            ],
            "test_its_weights_have_the_checkpoints_names": [but(named_weights=prefixed), but(named_weights=rounded)],
            "test_a_saved_state_goes_on_bit_for_bit": [
                but(load=lambda self, directory, weights_only=False: FsdpBackend.load(self, directory, True)),
                but(load=lambda self, directory, weights_only=False: None),
            ],
            "test_weights_alone_can_be_loaded": [
                but(load=lambda self, directory, weights_only=False: FsdpBackend.load(self, directory, False)),
            ],
            "test_a_state_that_is_not_there_is_an_error": [but(load=forgiving_load)],
            "test_offloading_leaves_no_trace": [but(offload=drops_gradients)],
            "test_it_says_which_share_it_works_on": [
                but(data_size=property(lambda self: 2, lambda self, value: None)),
            ],
            "test_a_reference_only_looks": [outputs(reference_noise)],
        },
    )
