"""miles against TRL's GRPO trainer on random batches: losses with gradient and metrics, corrections, KL in the loss;
and its golden values again."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from golden import GSPO, ICEPOP, PAPER_CISPO, PPO, SAPO, SEQUENCE_TIS, STEPS, TIS, TRL, assert_same, peer
from onestep import golden_batch, one_step, random_batch

GRPOTrainer = peer("trl.trainer.grpo_trainer").GRPOTrainer
pytestmark = pytest.mark.peers

AVERAGES = {
    "dapo": "token_mean",
    "grpo": "sample_mean",
    "dr_grpo": "constant",
    "cispo": "token_mean",
    "sapo": "sample_mean",
}
"""Loss types, each of which averages in its own way."""
CONSTANT = 12
SEEDS = range(4)
NEAR, FAR = 0.3, 1.0
"""Spreads of log-ratios: clipping here and there; beyond every bound. TRL has no clamp before `exp`."""


class Accelerator:
    """One process."""

    num_processes = 1
    sync_gradients = False
    gather = gather_for_metrics = staticmethod(lambda value: value)
    reduce = staticmethod(lambda value, reduction=None: value)


def trl_step(batch, loss_type, level="token", ratio_BS=None, low=0.2, high=0.28, beta=0.0, **args):
    """The loss that TRL's trainer takes the gradient of, in float64: its own method, on a trainer that has no model."""
    new_BS = batch.new_BS.double().requires_grad_()
    given = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    given |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**(given | args)),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        use_vllm=ratio_BS is not None,
        vllm_importance_sampling_correction=ratio_BS is not None,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=CONSTANT,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (new_BS, torch.zeros_like(new_BS), None),
    )
    rows, places = batch.mask_BS.shape
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1),
        "completion_ids": torch.zeros(rows, places, dtype=torch.long),
        "completion_mask": batch.mask_BS.double(),
        "advantages": batch.advantages_BS.double(),
        "old_per_token_logps": batch.old_BS.double(),
        "ref_per_token_logps": batch.ref_BS.double(),
        "num_items_in_batch": batch.mask_BS.sum(),
        "importance_sampling_ratio": ratio_BS,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), new_BS.grad, metrics


def ratios(batch, level="token"):
    """`old / rollout` as TRL computes it, before it is bounded."""
    log_ratio_BS = (batch.old_BS.double() - batch.rollout_BS.double()) * batch.mask_BS
    return (log_ratio_BS if level == "token" else log_ratio_BS.sum(1, keepdim=True)).exp()


def truncated(ratio_BS):
    return ratio_BS.clamp(max=2.0)


def within(ratio_BS, low=0.8, high=1.25):
    return ratio_BS.masked_fill((ratio_BS < low) | (ratio_BS > high), 0.0)


# -------------------------------------------------------------------------------------------------------- golden values

GOLDEN = {
    "ppo_clip": lambda b: trl_step(b, "dapo"),
    "ppo_clip with KL": lambda b: trl_step(b, "dapo", beta=1.0),
    "ppo_clip sample_mean": lambda b: trl_step(b, "grpo"),
    "ppo_clip constant": lambda b: trl_step(b, "dr_grpo"),
    "gspo sample_mean": lambda b: trl_step(b, "grpo", "sequence"),
    "cispo without a lower bound": lambda b: trl_step(b, "cispo", high=1.28),
    "sapo sample_mean": lambda b: trl_step(b, "sapo"),
    "tis": lambda b: trl_step(b, "dapo", ratio_BS=truncated(ratios(b))),
    "sequence tis": lambda b: trl_step(b, "dapo", ratio_BS=truncated(ratios(b, "sequence"))),
    "icepop": lambda b: trl_step(b, "dapo", ratio_BS=within(ratios(b))),
}


def test_every_golden_value_of_trl_is_computed():
    assert set(GOLDEN) == {name for name, row in STEPS.items() if TRL in row.of}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_steps(name):
    """SAPO's temperatures are float32 in TRL."""
    loss, gradient_BS, _ = GOLDEN[name](golden_batch())
    found = (loss, float(gradient_BS.norm()), float(gradient_BS[0, 0]))
    assert found == pytest.approx(STEPS[name].numbers, abs=5e-8 if "sapo" in name else 2e-9)


# ------------------------------------------------------------------------------------------------------- random batches


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("loss_type", "level", "loss"),
    [
        ("dapo", "token", PPO),
        ("grpo", "token", PPO),
        ("dr_grpo", "token", PPO),
        ("grpo", "sequence", GSPO),
        ("dapo", "sequence", GSPO),
        ("cispo", "token", PAPER_CISPO),
        ("sapo", "token", SAPO),
    ],
)
def test_losses(loss_type, level, loss, seed, spread):
    batch = random_batch(seed, spread, per_token=level == "token")
    bounds = {"high": 1.28} if loss_type == "cispo" else {}  # an upper bound of the ratio there, a distance from 1 here
    step = one_step(batch, policy_loss=loss, loss_aggregation=AVERAGES[loss_type], aggregation_constant=CONSTANT)
    loss, gradient_BS, metrics = trl_step(batch, loss_type, level, **bounds)
    assert_same(step, loss, gradient_BS)
    if level == "token" and loss_type in ("dapo", "grpo", "dr_grpo"):
        for ours, theirs in (("", "region"), ("_low", "low"), ("_high", "high")):
            expected = metrics[f"clip_ratio/{theirs}_mean"]
            assert step.metrics[f"train/pg_clipfrac{ours}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_in_the_loss(seed, loss_type, unbiased):
    batch = random_batch(seed)
    kl = {"kl_loss_coef": 0.5, "kl_type": "k3", "unbiased_kl": unbiased}
    step = one_step(batch, policy_loss=PPO, loss_aggregation=AVERAGES[loss_type], **kl)
    loss, gradient_BS, metrics = trl_step(batch, loss_type, beta=0.5, use_bias_correction_kl=unbiased)
    assert_same(step, loss, gradient_BS)
    if loss_type == "dapo":
        assert step.metrics["train/kl_loss"] == pytest.approx(metrics["kl"], rel=1e-5)


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("ours", "level", "bound"),
    [(TIS, "token", truncated), (SEQUENCE_TIS, "sequence", truncated), (ICEPOP, "token", within)],
    ids=["tis", "sequence tis", "icepop"],
)
def test_corrections(ours, level, bound, seed, spread):
    batch = random_batch(seed, spread)
    step = one_step(batch, policy_loss=PPO, loss_aggregation="sample_mean", is_correction=ours)
    assert_same(step, *trl_step(batch, "grpo", ratio_BS=bound(ratios(batch, level)))[:2])


@pytest.mark.parametrize("delta", [1e-4, 0.02])
@pytest.mark.parametrize("seed", [0, 2, 3])  # 1 has no sample to leave out
def test_off_policy_sequence_mask(seed, delta):
    batch = random_batch(seed)
    mask = {"name": "opsm", "delta": delta}
    step = one_step(batch, policy_loss="reinforce", loss_aggregation="token_mean", loss_masks=[mask])
    advantages_B1 = batch.advantages_BS[:, :1]
    columns = (batch.new_BS, batch.old_BS, batch.mask_BS)
    keep_B1 = GRPOTrainer.get_off_policy_mask(advantages_B1, *columns, delta)
    kept_BS = keep_B1 * batch.mask_BS
    assert 0 < kept_BS.sum() < batch.mask_BS.sum()
    expected_BS = -batch.advantages_BS * kept_BS / batch.mask_BS.sum()
    torch.testing.assert_close(step.gradient_BS, expected_BS)
    assert step.metrics["train/opsm_masked"] == pytest.approx(1 - float(kept_BS.sum() / batch.mask_BS.sum()), abs=1e-6)


# --------------------------------------------------------------------------------------------------- where it disagrees


def test_delta_bounds_a_ratio_and_no_loss():
    """TRL has no dual clip; its `delta` bounds the ratio, whatever the sign of the advantage."""
    batch = golden_batch()
    batch.old_BS = batch.new_BS - math.log(4)
    negative = batch.advantages_BS.clamp(max=0).sum() / batch.mask_BS.sum()
    positive = batch.advantages_BS.clamp(min=0).sum() / batch.mask_BS.sum()
    assert trl_step(batch, "dapo")[0] == pytest.approx(float(-4 * negative - 1.28 * positive), rel=1e-6)
    assert trl_step(batch, "dapo", delta=3)[0] == pytest.approx(float(-3 * negative - 1.28 * positive), rel=1e-6)


def test_cispo_has_one_bound_and_it_is_no_distance_from_one():
    batch = golden_batch()
    batch.old_BS = batch.new_BS - math.log(4)
    gradient_BS = trl_step(batch, "cispo", high=0.28)[1]
    torch.testing.assert_close(gradient_BS, (-0.28 * batch.advantages_BS / batch.mask_BS.sum()).double())


def test_a_ratio_that_overflows_is_no_number():
    batch = golden_batch()
    batch.old_BS = batch.new_BS - 800  # exp(800) is more than float64 holds
    loss, gradient_BS, _ = trl_step(batch, "dapo")
    assert not math.isfinite(loss)
    assert gradient_BS.isnan().any()


def test_kl_has_no_bounds():
    batch = golden_batch()
    batch.advantages_BS = torch.zeros_like(batch.advantages_BS)
    batch.ref_BS = batch.new_BS + 5
    assert trl_step(batch, "dapo", beta=1.0)[0] == pytest.approx(math.exp(5) - 6, rel=1e-6)


def test_a_sample_without_a_token_counts_in_the_mean_over_samples():
    batch = golden_batch()
    without = golden_batch()
    without.mask_BS[7] = 0
    kept_BS = trl_step(batch, "grpo")[1][:7]
    torch.testing.assert_close(trl_step(without, "grpo")[1][:7], kept_BS)
