"""Policy losses and corrections that are wrong in one way each."""

from dataclasses import replace
from itertools import pairwise

import torch

from miles.api import Correction, PolicyLoss
from miles.testing import ISCorrectionContract, LossMaskContract, PolicyLossContract


def ratio_of(inputs, bound=20.0):
    return (inputs.log_probs_T - inputs.old_log_probs_T).clamp(-bound, bound).exp()


def right(inputs):
    """PPO's surrogate by cases, not by max and min."""
    ratio_T, a_T = ratio_of(inputs), inputs.advantages_T
    clipped_T = ((a_T > 0) & (ratio_T > 1.2)) | ((a_T < 0) & (ratio_T < 0.8))
    loss_T = -torch.where(clipped_T, ratio_T.clamp(0.8, 1.2), ratio_T) * a_T
    return PolicyLoss(loss_T, {"clipped": clipped_T.float()})


def averaging(inputs):
    return PolicyLoss(right(inputs).loss_T.mean())


def detached(inputs):
    return PolicyLoss(right(inputs).loss_T.detach())


def normalising(inputs):
    loss_T = right(inputs).loss_T
    return PolicyLoss(loss_T / loss_T.abs().mean())


def in_place(inputs):
    inputs.advantages_T.mul_(2)
    return right(inputs)


def of(function):
    return lambda: function


def test_right_losses_pass(passes):
    passes(PolicyLossContract, of(right))


def test_wrong_losses_are_caught(catches):
    catches(
        PolicyLossContract,
        {
            "test_one_number_for_each_token": [
                of(averaging),
                of(lambda i: PolicyLoss(right(i).loss_T, {"clipped": right(i).metrics_T["clipped"].mean()})),
                of(lambda i: right(i).loss_T),
            ],
            "test_the_gradient_reaches_the_log_probs": [
                of(detached),
                of(lambda i: PolicyLoss(i.log_probs_T * 0)),
            ],
            "test_on_policy_it_is_the_policy_gradient": [
                of(lambda i: PolicyLoss(-right(i).loss_T)),
                of(lambda i: PolicyLoss(2 * right(i).loss_T)),
                of(lambda i: PolicyLoss(-i.advantages_T * (i.old_log_probs_T - i.log_probs_T))),
            ],
            "test_finite_however_far_the_policies_are_apart": [
                of(lambda i: PolicyLoss(-(ratio_of(i, 500.0) ** 2) * i.advantages_T)),
                of(lambda i: PolicyLoss(-i.advantages_T * ratio_of(i, 500.0) / ratio_of(i, 500.0).square())),
            ],
            "test_packing_changes_nothing": [
                of(normalising),
                of(lambda i: PolicyLoss(right(i).loss_T - right(i).loss_T.mean())),
                of(lambda i: PolicyLoss(right(i).loss_T.cumsum(0))),
            ],
            "test_without_samples_there_is_no_loss": [
                of(lambda i: PolicyLoss(right(i).loss_T * i.advantages_T.max())),
            ],
            "test_metrics_are_detached": [of(lambda i: PolicyLoss(right(i).loss_T, {"ratio": ratio_of(i)}))],
            "test_its_inputs_are_left_alone": [
                of(in_place),
                of(lambda i: PolicyLoss(right(i).loss_T + torch.rand(1))),
            ],
        },
    )


# ------------------------------------------------------------------------------------------------------------- masks


def near(inputs, reach=1.0):
    return (inputs.log_probs_T - inputs.old_log_probs_T).detach().abs() <= reach


def near_on_the_mean(inputs):
    """Whole sequences count or do not, by the mean log-ratio of what is trained."""
    keep_T = torch.ones_like(inputs.mask_T)
    log_ratio_T = (inputs.log_probs_T - inputs.old_log_probs_T).detach() * inputs.mask_T
    for start, end in pairwise(inputs.bounds):
        span = slice(start, end)
        keep_T[span] = float(log_ratio_T[span].sum().abs() <= 0.5 * inputs.mask_T[span].sum())
    return keep_T


def test_right_masks_pass(passes):
    passes(LossMaskContract, of(near))
    passes(LossMaskContract, of(near_on_the_mean))


def test_wrong_masks_are_caught(catches):
    def in_place(inputs):
        inputs.advantages_T.zero_()
        return near(inputs)

    def without_the_pad(inputs):
        keep_T = near(inputs).float()
        return keep_T if len(keep_T) == inputs.bounds[-1] else 1 - keep_T

    def unmasked(inputs):
        return near_on_the_mean(replace(inputs, mask_T=torch.ones_like(inputs.mask_T)))

    catches(
        LossMaskContract,
        {
            "test_one_yes_or_no_for_each_token": [
                of(lambda i: near(i).all()),
                of(lambda i: near(i).float() * 0.5),
                of(lambda i: near(i).tolist()),
            ],
            "test_it_is_no_part_of_the_graph": [of(lambda i: near(i) + 0 * i.log_probs_T)],
            "test_on_policy_everything_counts": [of(lambda i: i.advantages_T > 0), of(lambda i: ~near(i))],
            "test_off_policy_something_is_left_out": [of(lambda i: torch.ones_like(i.mask_T))],
            "test_packing_changes_nothing": [of(lambda i: near(i) & (near(i).float().mean() > 0.5))],
            "test_without_samples_there_is_no_mask": [of(lambda i: near(i, float(i.mask_T.max())))],
            "test_a_pad_is_no_sample": [of(without_the_pad), of(lambda i: near(i) & (len(i.mask_T) == i.bounds[-1]))],
            "test_tokens_without_a_loss_have_no_say": [of(unmasked)],
            "test_its_inputs_are_left_alone": [
                of(in_place),
                of(lambda i: near(i, 0.01) | (torch.rand(len(i.mask_T)) > 0.5)),
            ],
        },
    )


# ------------------------------------------------------------------------------------------------------- corrections


def weights_of(train_T, rollout_T, high=2.0):
    return (train_T - rollout_T).clamp(-20, 20).exp().clamp(max=high)


def truncated(train_T, rollout_T, mask_T, bounds):
    weights_T = torch.where(mask_T > 0, weights_of(train_T, rollout_T), 1.0)
    return Correction(weights_T, metrics={"weight": float(weights_T.mean())})


def by_sequence(train_T, rollout_T, mask_T, bounds):
    """Whole sequences are rejected when their mean log-ratio is far from 0."""
    keep_T = torch.ones_like(mask_T)
    for start, end in pairwise(bounds):
        span = slice(start, end)
        far = (((train_T - rollout_T) * mask_T)[span].sum() / mask_T[span].sum().clamp(min=1)).abs()
        keep_T[span] = float(far < 0.5)
    return Correction(keep_T=keep_T)


def test_right_corrections_pass(passes):
    passes(ISCorrectionContract, of(truncated))
    passes(ISCorrectionContract, of(by_sequence))


def test_wrong_corrections_are_caught(catches):
    def in_place(train_T, rollout_T, mask_T, bounds):
        rollout_T.sub_(train_T)
        return Correction(rollout_T.exp())

    def unmasked_sequences(train_T, rollout_T, mask_T, bounds):
        return by_sequence(train_T, rollout_T, torch.ones_like(mask_T), bounds)

    def over_the_batch(train_T, rollout_T, mask_T, bounds):
        found = truncated(train_T, rollout_T, mask_T, bounds)
        return Correction(found.weights_T / found.weights_T.mean())

    catches(
        ISCorrectionContract,
        {
            "test_one_number_for_each_token": [
                of(lambda t, r, m, b: Correction(weights_of(t, r).mean())),
                of(lambda t, r, m, b: Correction()),
                of(lambda t, r, m, b: Correction(weights_of(t.requires_grad_(), r))),
            ],
            "test_no_mismatch_no_correction": [
                of(lambda t, r, m, b: Correction(weights_of(t, r) * 0.9)),
                of(lambda t, r, m, b: Correction(keep_T=(t != r).float())),
            ],
            "test_a_mismatch_is_corrected": [of(lambda t, r, m, b: Correction(torch.ones_like(t)))],
            "test_what_was_drawn_too_often_counts_no_more": [
                of(lambda t, r, m, b: Correction(weights_of(r, t))),
                of(lambda t, r, m, b: Correction((t - r).abs().clamp(max=20).exp().clamp(max=2.0))),
            ],
            "test_finite_however_far_the_policies_are_apart": [
                of(lambda t, r, m, b: Correction((t - r).exp())),
                of(lambda t, r, m, b: Correction(weights_of(t, r), metrics={"kl": float((t - r).exp().mean())})),
            ],
            "test_weights_are_not_negative_and_keep_is_a_mask": [
                of(lambda t, r, m, b: Correction(1 + (t - r))),
                of(lambda t, r, m, b: Correction(keep_T=weights_of(t, r) / 2)),
            ],
            "test_samples_are_corrected_one_by_one": [of(over_the_batch)],
            "test_tokens_without_a_loss_have_no_say": [of(unmasked_sequences)],
            "test_its_inputs_are_left_alone": [of(in_place)],
            "test_metrics_are_numbers": [
                of(lambda t, r, m, b: Correction(weights_of(t, r), metrics={"mean": weights_of(t, r).mean()})),
            ],
        },
    )
