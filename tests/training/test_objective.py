"""The loss of a micro-batch: hand numbers, and the same number however the batch is cut."""

import pytest
import torch

from miles.config.algorithm import AlgorithmSection
from miles.errors import TrainError
from miles.training.aggregation import token_weights
from miles.training.objective import Objective
from miles.training.packing import build_micro_batch
from miles.types import Outputs, PolicyLoss


def reinforce(inputs):
    return PolicyLoss(-inputs.advantages_T * inputs.log_probs_T, {"advantage": inputs.advantages_T})


def table(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 6, 4, 7, 5][:count]
    tokens = [list(range(n)) for n in lengths]
    total = sum(lengths)
    mask = (torch.rand(total, generator=generator) > 0.4).float()
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    columns = {
        "mask": mask,
        "advantages": torch.randn(total, generator=generator),
        "old_log_probs": -torch.rand(total, generator=generator),
        "ref_log_probs": -torch.rand(total, generator=generator),
        "rollout_log_probs": -torch.rand(total, generator=generator),
        "mismatch_weights": mask / mask.sum(),
        "weights": token_weights(mask, bounds, torch.arange(count), "sample_mean"),
    }
    return lengths, tokens, columns, -torch.rand(total, generator=generator)


def total(parts, algorithm, trained, **drop):
    lengths, tokens, columns, log_probs = table()
    objective = Objective(algorithm, reinforce)
    objective.tokens = trained
    columns = {k: list(v.split(lengths)) for k, v in columns.items() if k not in drop}
    pieces = log_probs.split(lengths)
    loss, sums = 0.0, {}
    for rows in parts:
        batch = build_micro_batch(rows, tokens, columns)
        outputs = Outputs(
            log_probs_T=torch.cat([pieces[r] for r in rows]).requires_grad_(),
            entropy_T=torch.cat([pieces[r] for r in rows]).neg(),
        )
        result = objective(batch, outputs)
        loss += float(result.loss.detach())
        for name, value in result.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return loss, sums


FULL = AlgorithmSection(kl_loss_coef=0.3, kl_type="k3", unbiased_kl=True, entropy_coef=0.1)


def test_the_cut_into_micro_batches_changes_nothing():
    whole, whole_sums = total([[0, 1, 2, 3, 4]], FULL, 10.0)
    for parts in ([[0], [1], [2], [3], [4]], [[4, 2], [0, 3, 1]]):
        loss, sums = total(parts, FULL, 10.0)
        assert loss == pytest.approx(whole, abs=1e-6)
        assert sums == pytest.approx(whole_sums, abs=1e-6)


def test_the_mismatch_is_a_mean_over_trainable_tokens():
    _, _, columns, log_probs = table()
    _, sums = total([[0, 1, 2, 3, 4]], FULL, 10.0)
    differences = (log_probs - columns["rollout_log_probs"]).abs()[columns["mask"] > 0]
    assert sums["mismatch/abs_diff"] == pytest.approx(float(differences.mean()), abs=1e-6)


def test_by_hand():
    lengths, _, columns, log_probs = table()
    loss, sums = total([[0, 1, 2, 3, 4]], FULL, float(columns["mask"].sum()), mismatch_weights=None)
    weights, ratio = columns["weights"], log_probs - columns["ref_log_probs"]
    pg = -(columns["advantages"] * log_probs * weights).sum()
    k3 = (-ratio).exp() - 1 + ratio
    kl = (k3 * (log_probs - columns["old_log_probs"]).exp() * weights).sum()
    entropy = (-log_probs * weights).sum()
    assert loss == pytest.approx(float(pg + 0.3 * kl - 0.1 * entropy), abs=1e-6)
    assert sums["train/pg_loss"] == pytest.approx(float(pg), abs=1e-6)
    assert sums["train/kl_loss"] == pytest.approx(float(kl), abs=1e-6)
    mean_entropy = (-log_probs * columns["mask"]).sum() / columns["mask"].sum()
    assert sums["train/entropy"] == pytest.approx(float(mean_entropy), abs=1e-6)
    assert not any(name.startswith("mismatch/") for name in sums)
    assert len(lengths) == 5


def test_corrections_scale_and_reject_without_touching_the_denominator():
    _, tokens, columns, log_probs = table(count=1)
    columns |= {"is_weights": torch.tensor([2.0, 2, 2]), "keep": torch.tensor([1.0, 0, 1]), "mask": torch.ones(3)}
    columns["weights"] = torch.full((3,), 1 / 3)
    objective = Objective(AlgorithmSection(), reinforce)
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    loss = objective(batch, Outputs(log_probs_T=log_probs)).loss
    expected = -(columns["advantages"] * log_probs * torch.tensor([2.0, 0, 2])).sum() / 3
    assert float(loss) == pytest.approx(float(expected))


def near(inputs):
    return (inputs.log_probs_T - inputs.old_log_probs_T).abs() < 1


def test_masks_drop_tokens_without_touching_the_denominator():
    _, tokens, columns, _ = table(count=1)
    old, advantages = columns["old_log_probs"], torch.tensor([1.0, -2, 3])
    columns |= {"mask": torch.ones(3), "weights": torch.full((3,), 1 / 3), "advantages": advantages}
    columns["ref_log_probs"] = old
    new = (old + torch.tensor([0.5, 0.5, 5.0])).requires_grad_()
    masks = [("pkg/near", near), ("my.own:downward", lambda inputs: (inputs.advantages_T > 0).float())]
    objective = Objective(AlgorithmSection(kl_loss_coef=0.1, kl_type="k1"), reinforce, masks)
    objective.tokens = 3.0
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    result = objective(batch, Outputs(log_probs_T=new))
    assert float(result.sums["train/pg_loss"]) == pytest.approx(-new[0].item() / 3)
    assert float(result.sums["train/near_masked"]) == pytest.approx(1 / 3)
    assert float(result.sums["train/downward_masked"]) == pytest.approx(1 / 3)
    assert float(objective.losses[0][1]) == pytest.approx(-new[0].item() / 3)
    result.loss.backward()
    assert new.grad.tolist() == pytest.approx([(0.1 - 1) / 3, 0.1 / 3, 0.1 / 3])  # the KL term is not masked


def test_what_a_mask_leaves_out_may_be_infinite():
    _, tokens, columns, log_probs = table(count=1)
    columns |= {"mask": torch.ones(3), "weights": torch.full((3,), 1 / 3), "old_log_probs": log_probs}
    columns["advantages"] = torch.tensor([1.0, float("inf"), 1.0])
    masks = [("finite", lambda inputs: inputs.advantages_T.isfinite())]
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    loss = Objective(AlgorithmSection(), reinforce, masks)(batch, Outputs(log_probs_T=log_probs)).loss
    assert float(loss) == pytest.approx(float(-log_probs[[0, 2]].sum() / 3))


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (lambda inputs: None, r"loss mask 'near' \(.*test_objective.py:\d+\) returned None \(NoneType\); a mask"),
        (lambda inputs: near(inputs)[:2], r"returned shape \(2,\); a mask of shape \(3,\), bool or 0 and 1"),
        (lambda inputs: near(inputs) * 0.5, "values other than 0 and 1"),
        (lambda inputs: near(inputs) / 0 - near(inputs) / 0, "values other than 0 and 1"),
        (lambda inputs: inputs.nothing, "raised AttributeError"),
    ],
)
def test_a_mask_that_is_none_is_named(mask, complaint):
    _, tokens, columns, log_probs = table(count=1)
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    objective = Objective(AlgorithmSection(), reinforce, [("near", mask)])
    with pytest.raises(TrainError, match=complaint):
        objective(batch, Outputs(log_probs_T=log_probs))


def test_without_old_log_probs_the_ratio_is_one_and_still_has_a_gradient():
    def ratio_loss(inputs):
        return PolicyLoss(-(inputs.log_probs_T - inputs.old_log_probs_T).exp() * inputs.advantages_T)

    _, tokens, columns, log_probs = table(count=1)
    del columns["old_log_probs"]
    columns |= {"mask": torch.ones(3), "weights": torch.full((3,), 1 / 3)}
    new = log_probs.clone().requires_grad_()
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    result = Objective(AlgorithmSection(), ratio_loss)(batch, Outputs(log_probs_T=new))
    assert float(result.loss) == pytest.approx(float(-columns["advantages"].mean()))
    result.loss.backward()
    assert torch.allclose(new.grad, -columns["advantages"] / 3)


def test_values_off_the_mask_cannot_poison_the_loss():
    _, tokens, columns, log_probs = table(count=1)
    columns |= {"mask": torch.tensor([0.0, 1, 1]), "weights": torch.tensor([0.0, 0.5, 0.5])}
    columns["advantages"] = torch.tensor([float("nan"), 1.0, 1.0])
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    new = log_probs.clone().requires_grad_()
    loss = Objective(AlgorithmSection(), reinforce)(batch, Outputs(log_probs_T=new)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert new.grad[1:].tolist() == [-0.5, -0.5]


def test_the_loss_of_each_sample_is_the_mean_over_its_trainable_tokens():
    columns = {
        "mask": [torch.tensor([0.0, 1, 1]), torch.tensor([0.0, 1]), torch.tensor([0.0, 0])],
        "advantages": [torch.tensor([0.0, 1, 1]), torch.tensor([0.0, -2]), torch.tensor([0.0, 5])],
        "weights": [torch.zeros(3), torch.zeros(2), torch.zeros(2)],
    }
    batch = build_micro_batch([0, 1, 2], [[1, 2, 3], [1, 2], [1, 2]], columns)
    objective = Objective(AlgorithmSection(), reinforce)
    objective(batch, Outputs(log_probs_T=torch.tensor([0.0, -1, -3, 0, -0.5, 0, -7])))
    ((ids, loss_N),) = objective.losses
    assert ids == [0, 1, 2]
    assert loss_N.tolist() == [2.0, -1.0, 0.0]  # (1 + 3) / 2, -2 x 0.5, nothing trainable


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (
            lambda inputs: -inputs.log_probs_T,
            r"'mine' \(.*test_objective.py:\d+\) returned Tensor; a miles.api.PolicyLoss",
        ),
        (
            lambda inputs: PolicyLoss(inputs.log_probs_T.mean()),
            r"returned shape \(\) instead of shape \(3,\), one value a",
        ),
    ],
)
def test_a_policy_loss_that_is_none_is_named(loss, complaint):
    _, tokens, columns, log_probs = table(count=1)
    batch = build_micro_batch([0], tokens, {k: [v] for k, v in columns.items()})
    objective = Objective(AlgorithmSection(policy_loss="mine"), loss)
    with pytest.raises(TrainError, match=complaint):
        objective(batch, Outputs(log_probs_T=log_probs))
