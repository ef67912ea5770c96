"""Where implementations disagree: what miles does, by numbers worked out by hand. docs/algorithms.md has the table,
whose rows name these tests; peers/ shows what the others do."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import GEOMETRIC_MASK, GSPO, PPO, SAPO, SEQUENCE_TIS
from onestep import Batch, advantages, golden_batch, one_step

DOCS = Path(__file__).parents[2] / "docs/algorithms.md"


def batch_of(masks, rewards=None, groups=None, **columns):
    """Samples of these masks, all log-probs -1 and advantages 1 if not given. A number in `columns` stands for all."""
    places = max(map(len, masks))
    mask_BS = torch.tensor([[*mask, *[0] * (places - len(mask))] for mask in masks], dtype=torch.float32)

    def column(name, otherwise=-1.0):
        values = columns.get(name, otherwise)
        return (
            torch.tensor(values) * mask_BS if isinstance(values, list) else torch.full_like(mask_BS, values) * mask_BS
        )

    return Batch(
        [len(mask) for mask in masks],
        mask_BS,
        column("new"),
        column("old"),
        column("rollout"),
        column("ref"),
        column("advantages", 1.0),
        rewards_B=torch.tensor(rewards or [0.0] * len(masks)),
        group_B=groups or [0] * len(masks),
        values_BS=column("values", 0.0),
        new_values_BS=column("new_values", 0.0),
        baseline_B=torch.zeros(len(masks)),
    )


def first(name, batch, **options):
    """Advantage of each sample's first token."""
    return advantages(batch, name, options)[0][:, 0].tolist()


# ----------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_one_says_nothing(name):
    batch = batch_of([[1], [1], [1]], rewards=[0.7, 0.0, 1.0], groups=[0, 1, 1])
    found = first(name, batch)
    assert found[0] == 0
    assert found[2] == -found[1] > 0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "maxrl"])
def test_rewards_that_agree_give_exactly_nothing(name):
    """0.1 is no float: its mean over seven may be another number than itself."""
    assert first(name, batch_of([[1]] * 7, rewards=[0.1] * 7)) == [0.0] * 7


def test_the_deviation_is_unbiased_and_epsilon_small():
    batch = batch_of([[1], [1]], rewards=[1.0, 0.0])
    deviation = math.sqrt(0.5)  # of a population: 0.5
    assert first("grpo", batch)[0] == pytest.approx(0.5 / (deviation + 1e-6), abs=1e-7)
    assert first("grpo", batch, epsilon=1e-4)[0] == pytest.approx(0.5 / (deviation + 1e-4), abs=1e-7)


def test_returns_step_over_an_environment():
    """Model, environment, environment, model: the reward is one step away from the first token, not three."""
    batch = batch_of([[1, 0, 0, 1], [1, 0, 0, 1]], rewards=[1.0, 0.0])
    found_BS, _ = advantages(batch, "reinforce_plus_plus", {"gamma": 0.5})
    returns = torch.tensor([0.5, 1, 0, 0])
    expected = (returns - returns.mean()) / returns.std()
    assert found_BS[:, [0, 3]].flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert found_BS[:, 1:3].abs().sum() == 0


def test_gae_steps_over_an_environment_and_whitens_nothing():
    """V is 0.5 and 0.25 at the model's tokens. d_2 = 1 - 0.25, d_1 = 0.5 * 0.25 - 0.5, A_1 = d_1 + 0.4 d_2"""
    values = [[0.5, 9.0, 9.0, 0.25]]
    batch = batch_of([[1, 0, 0, 1]], rewards=[1.0])
    batch.values_BS = torch.tensor(values)
    found_BS, returns_BS = advantages(batch, "gae", {"gamma": 0.5, "lam": 0.8})
    assert found_BS.flatten().tolist() == pytest.approx([-0.375 + 0.4 * 0.75, 0, 0, 0.75])
    assert returns_BS.flatten().tolist() == pytest.approx([-0.075 + 0.5, 0, 0, 1.0])


def test_the_value_after_a_truncated_sample_is_nothing():
    """All samples end with their reward: nobody valued the state after the last token."""
    batch = batch_of([[1]], rewards=[1.0], values=0.25)
    assert advantages(batch, "gae", {})[1].item() == 1.0


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("bound", "expected"), [(None, 4.0), (3.0, 3.0)])
def test_dual_clip_is_an_option(bound, expected):
    """r = 4 and A = -1."""
    batch = batch_of([[1]], new=-1.0, old=-1.0 - math.log(4), advantages=-1.0)
    step = one_step(batch, policy_loss=PPO | {"eps_clip_c": bound})
    assert step.loss == pytest.approx(expected, rel=1e-6)
    assert step.gradient_BS.item() == pytest.approx(4.0 if bound is None else 0.0, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "ratio", "weight"),
    [
        ({"eps": None, "eps_high": 0.28}, 4.0, 1.28),  # a distance from 1
        ({"eps": None, "eps_high": 0.28}, 0.1, 0.1),  # no lower bound
        ({"eps": 0.2, "eps_high": 0.28}, 0.1, 0.8),
        ({}, 9.0, 5.0),
    ],
)
def test_bounds_of_cispo_are_distances_from_one(options, ratio, weight):
    batch = batch_of([[1]], old=-1.0 - math.log(ratio), advantages=2.0)
    step = one_step(batch, policy_loss={"name": "cispo", **options})
    assert step.gradient_BS.item() == pytest.approx(-weight * 2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("average", "expected"), [("sample_mean", -(1.1 + 0.9) / 2), ("token_mean", -(1.1 + 3 * 0.9) / 4)]
)
@pytest.mark.parametrize("loss", [GSPO, SAPO], ids=["gspo", "sapo"])
def test_gspo_and_sapo_are_averaged_as_told(loss, average, expected):
    """A sample of one token with ratio 1.1, one of three with 0.9."""
    ratios = torch.tensor([[1.1, 1, 1], [0.9, 0.9, 0.9]])
    batch = batch_of([[1], [1, 1, 1]], old=(-1 - ratios.log()).tolist())
    found = one_step(batch, policy_loss=loss, loss_aggregation=average).loss
    if loss is SAPO:
        gate = [4 / (1 + math.exp(-(r - 1))) for r in (1.1, 0.9)]
        expected = -sum(gate) / 2 if average == "sample_mean" else -(gate[0] + 3 * gate[1]) / 4
    assert found == pytest.approx(expected, rel=1e-6)


def test_truncation_of_dppo_is_its_own_and_wide():
    """A rare token: the ratio is 10, the probability has hardly moved."""
    batch = batch_of([[1]], new=-6.0, old=-6.0 - math.log(10))
    assert one_step(batch, policy_loss="dppo_tv").gradient_BS.item() == pytest.approx(-10.0, rel=1e-5)
    bounded = {"name": "dppo_tv", "truncation": 3.0}
    assert one_step(batch, policy_loss=bounded).gradient_BS.item() == pytest.approx(-3.0, rel=1e-5)


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "cispo", "sapo", "dppo_tv"])
@pytest.mark.parametrize("far", [-800.0, 800.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_ratio_overflows(loss, far, sign):
    batch = batch_of([[1, 1], [1, 1]], new=[[-1.0, -1.0 + min(far, 0)], [-1.0, -1.0]], advantages=sign)
    batch.old_BS = batch.new_BS - far * torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    step = one_step(batch, policy_loss=loss)
    assert math.isfinite(step.loss)
    assert step.gradient_BS.isfinite().all()


def test_bounds_of_kl():
    """lp_ref - lp is 5, then -25: k3 has no bound above, low_var_kl has 10; log-ratios have 20."""
    for kind, ref, expected in (
        ("k3", 5.0, math.exp(5) - 6),
        ("low_var_kl", 5.0, 10.0),
        ("k1", 30.0, -30.0),
        ("k2", 30.0, 450.0),
        ("k3", -25.0, math.exp(-20) - 1 + 20),
    ):
        batch = batch_of([[1]], ref=-1.0 + ref, advantages=0.0)
        step = one_step(batch, policy_loss="reinforce", kl_loss_coef=1.0, kl_type=kind)
        assert step.loss == pytest.approx(expected, rel=1e-5), kind


@pytest.mark.parametrize(("value", "loss"), [(0.9, 0.5 * 0.1**2), (0.4, 0.5 * 0.6**2), (1.5, 0.5 * 0.5**2)])
def test_the_value_loss_is_halved(value, loss):
    """V was 0.5 and should be 1. From 0.9 nothing is saved by the clip at 0.7: the larger of the two errors counts."""
    batch = batch_of([[1]], rewards=[1.0], values=0.5, new_values=value)
    free = one_step(batch, given=False, advantage_estimator="gae", critic={"value_clip": None})
    assert free.metrics["critic/value_loss"] == pytest.approx(loss, rel=1e-5)
    clipped = one_step(batch, given=False, advantage_estimator="gae", critic={"value_clip": 0.2})
    assert clipped.metrics["critic/value_loss"] == pytest.approx(
        max(loss, 0.5 * 0.3**2 if value > 0.7 else 0), rel=1e-5
    )


# ------------------------------------------------------------------------------------------------------------- averages


def test_a_sample_without_a_trainable_token_counts_as_one():
    batch = batch_of([[1, 1], [0, 0]])
    assert one_step(batch, policy_loss="reinforce", loss_aggregation="sample_mean").loss == pytest.approx(0.5)
    assert one_step(batch, policy_loss="reinforce", loss_aggregation="token_mean").loss == pytest.approx(1.0)


def test_the_constant_is_a_setting_and_else_the_longest_response_allowed():
    batch = batch_of([[1, 1], [1]])
    settings = {"policy_loss": "reinforce", "loss_aggregation": "constant"}
    assert one_step(batch, **settings, aggregation_constant=10).loss == pytest.approx(3 / (2 * 10))
    assert one_step(batch, **settings).loss == pytest.approx(3 / (2 * 256))  # max_new_tokens


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_means_are_over_the_whole_step(ranks):
    """Samples of one and three tokens, each in a micro-batch of its own: a mean of means would be 1.5."""
    batch = batch_of([[1], [1, 1, 1]], new=[[-2.0, 0, 0], [-1.0, -1.0, -1.0]])
    step = one_step(batch, policy_loss="reinforce", loss_aggregation="token_mean", max_tokens=1, ranks=ranks)
    assert step.loss == pytest.approx((2 + 3 * 1) / 4)


# ---------------------------------------------------------------------------------------------------------- corrections


def test_what_is_rejected_keeps_its_place_in_the_average():
    """Two samples of ratio 1 and 1.5: the second is dropped, and the mean is over both."""
    batch = batch_of([[1], [1]], rollout=[[-1.0], [-1.0 - math.log(1.5)]])
    step = one_step(batch, policy_loss="reinforce", is_correction=GEOMETRIC_MASK)
    assert step.gradient_BS.flatten().tolist() == [-0.5, 0.0]


def test_a_sequence_is_weighted_by_its_product_or_its_geometric_mean():
    """Ratios of 1.1 and 1.5: product 1.65, geometric mean 1.285."""
    batch = batch_of([[1, 1]], rollout=[[-1 - math.log(1.1), -1 - math.log(1.5)]])
    for level, weight in (("sequence", 1.65), ("geometric", math.sqrt(1.65))):
        step = one_step(batch, policy_loss="reinforce", is_correction=SEQUENCE_TIS | {"level": level})
        assert step.gradient_BS.flatten().tolist() == pytest.approx([-weight / 2] * 2, rel=1e-5)


@pytest.mark.parametrize(("ratio", "kept"), [(1.5, 0), (1 / 1.5, 1)])
def test_bounds_of_rejection_are_those_of_trainer_over_rollout(ratio, kept):
    bounds = {"reject_level": "token", "reject_low": 0.5, "reject_high": 1.2}
    batch = batch_of([[1]], rollout=-1.0 - math.log(ratio))
    step = one_step(batch, policy_loss="reinforce", is_correction=GEOMETRIC_MASK | bounds)
    assert step.gradient_BS.item() == -kept


def test_ties_at_the_cut_of_m2po_go_together():
    """The mean of four times 0.16 and two times 0 is above 0.1; without one of the four it is below."""
    batch = batch_of([[1] * 6], rollout=[[-1.4, -1.4, -0.6, -0.6, -1.0, -1.0]])
    step = one_step(batch, policy_loss="reinforce", is_correction={"name": "m2po", "threshold": 0.1})
    assert (step.gradient_BS != 0).flatten().tolist() == [False] * 4 + [True] * 2


def test_normalised_weights_have_mean_one_over_the_batch():
    """Over all tokens, and so the same however the batch is cut: ratios 2, 1 and 1 in two micro-batches."""
    batch = batch_of([[1], [1, 1]], rollout=[[-1 - math.log(2), 0], [-1.0, -1.0]])
    correction = SEQUENCE_TIS | {"level": "token", "normalize": True}
    settings = {"policy_loss": "reinforce", "loss_aggregation": "token_mean", "is_correction": correction}
    step = one_step(batch, **settings, max_tokens=1)
    assert step.gradient_BS[batch.mask_BS > 0].tolist() == pytest.approx([-2 / 4, -1 / 4, -1 / 4], rel=1e-5)


def test_what_a_fully_masked_batch_teaches():
    """A rank or micro-batch without a trainable token takes part and adds nothing."""
    batch = golden_batch()
    masked = replace(batch, mask_BS=batch.mask_BS.clone())
    masked.mask_BS[3:] = 0
    alone = one_step(masked, policy_loss=PPO, loss_aggregation="token_mean", ranks=8)
    assert alone.gradient_BS[3:].abs().sum() == 0
    together = one_step(masked, policy_loss=PPO, loss_aggregation="token_mean")
    assert alone.numbers == pytest.approx(together.numbers, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_row_of_the_table_names_a_test():
    section = DOCS.read_text().partition("## Where implementations disagree")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert rows
    assert [row for row, tests in zip(rows, named, strict=True) if not tests] == []
    sources = [path.read_text() for path in (Path(__file__), *Path(__file__).parent.glob("peers/test_*.py"))]
    missing = [t for tests in named for t in tests if not any(f"def {t}(" in source for source in sources)]
    assert missing == []
