"""miles against verl on random batches: advantages, losses with gradient and metrics, corrections, KL; and its golden
values again."""

import math

import numpy as np
import pytest
import torch
from golden import (
    ADVANTAGES,
    CISPO,
    DPPO,
    GEOMETRIC_MASK,
    GSPO,
    ICEPOP,
    PPO,
    SAPO,
    SEQUENCE_TIS,
    STEPS,
    TIS,
    VERL,
    assert_same,
    peer,
)
from onestep import advantages, golden_batch, one_step, random_batch

from miles.training.statistics import whiten

core = peer("verl.trainer.ppo.core_algos")
correction = peer("verl.trainer.ppo.rollout_corr_helper")
ActorConfig = peer("verl.workers.config").ActorConfig
AlgoConfig = peer("verl.trainer.config").AlgoConfig
pytestmark = pytest.mark.peers

AVERAGES = {
    "token_mean": "token-mean",
    "sample_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
    "sequence_sum": "seq-mean-token-sum",
}
CONSTANT = 12
SEEDS = range(4)
NEAR, FAR = 0.3, 2.0
"""Spreads of log-ratios: clipping here and there; beyond every bound, some beyond +-20."""


def verl_step(batch, name, aggregation, *, mask_BS=None, weights_BS=None, kl=None, **config):
    """verl's loss, gradient and metrics, in float64. Tokens that `mask_BS` leaves out keep their place in the average,
    because verl is told how many there were."""
    sizes = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 2}
    bounds = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    config = ActorConfig(**sizes, **(bounds | config))
    config.global_batch_info.update(batch_num_tokens=float(batch.mask_BS.sum()), loss_scale_factor=CONSTANT)
    new_BS = batch.new_BS.double().requires_grad_()
    loss, metrics = core.get_policy_loss_fn(name)(
        old_log_prob=batch.old_BS.double(),
        log_prob=new_BS,
        advantages=batch.advantages_BS.double(),
        response_mask=(batch.mask_BS if mask_BS is None else mask_BS).double(),
        loss_agg_mode=AVERAGES[aggregation],
        config=config,
        rollout_is_weights=weights_BS,
    )
    if kl:
        kl_BS = core.kl_penalty(new_BS, batch.ref_BS.double(), kl)
        loss = loss + core.agg_loss(kl_BS, batch.mask_BS.double(), AVERAGES[aggregation], **config.global_batch_info)
    loss.backward()
    return float(loss.detach()), new_BS.grad, metrics


def weights_of(batch, level, threshold, normalize=False):
    log_ratio_BS = batch.old_BS.double() - batch.rollout_BS.double()
    return correction.compute_rollout_correction_weights(
        log_ratio_BS, batch.mask_BS.double(), level, threshold, normalize
    )


def mask_of(batch, rule, low, high):
    """What is left of the mask by verl's bounds, which are those of `rollout / old`."""
    log_ratio_BS = batch.old_BS.double() - batch.rollout_BS.double()
    return correction.compute_rollout_rejection_mask(log_ratio_BS, batch.mask_BS.double(), rule, f"{low}_{high}")[0]


def inverse_mask(batch, low, high, rule="seq_mean_k1"):
    """The same by bounds of `old / rollout`."""
    return mask_of(batch, rule, 1 / high, 1 / low)


def raw_ratios(batch):
    return (batch.old_BS.double() - batch.rollout_BS.double()).clamp(-20, 20).exp()


def token_rewards(batch):
    """verl pays a trajectory at a token: its last trainable one."""
    rewards_BS = torch.zeros_like(batch.mask_BS, dtype=torch.float64)
    places = torch.arange(batch.mask_BS.shape[1])
    last_B = (batch.mask_BS * places).argmax(dim=1)
    rewards_BS[torch.arange(len(last_B)), last_B] = batch.rewards_B.double()
    return rewards_BS


def outcome(name, **fields):
    estimator = getattr(core, f"compute_{name}_outcome_advantage")
    return lambda b: estimator(
        token_rewards(b), response_mask=b.mask_BS.double(), index=np.array(b.group_B, dtype=object), **fields
    )


def returns(batch, gamma):
    return core.compute_reinforce_plus_plus_outcome_advantage(
        token_rewards(batch), batch.mask_BS.double(), config=AlgoConfig(gamma=gamma)
    )


ESTIMATORS = {
    "grpo": outcome("grpo"),
    "dr_grpo": outcome("grpo", norm_adv_by_std_in_grpo=False),
    "rloo": outcome("rloo"),
    "reinforce_plus_plus_baseline": outcome("reinforce_plus_plus_baseline"),
    "reinforce_plus_plus": lambda b: returns(b, gamma=0.9),
    "remax": lambda b: core.compute_remax_outcome_advantage(
        token_rewards(b), b.baseline_B.double(), b.mask_BS.double()
    ),
    "gae": lambda b: core.compute_gae_advantage_return(
        token_rewards(b), b.values_BS.double(), b.mask_BS.double(), gamma=0.9, lam=0.8
    ),
}
OPTIONS = {"reinforce_plus_plus": {"gamma": 0.9}, "gae": {"gamma": 0.9, "lam": 0.8}}


# -------------------------------------------------------------------------------------------------------- golden values

GOLDEN = {
    "ppo_clip": lambda b: verl_step(b, "vanilla", "token_mean"),
    "ppo_clip sample_mean": lambda b: verl_step(b, "vanilla", "sample_mean"),
    "ppo_clip constant": lambda b: verl_step(b, "vanilla", "constant"),
    "ppo_clip with KL": lambda b: verl_step(b, "vanilla", "token_mean", kl="k3"),
    "gspo sample_mean": lambda b: verl_step(b, "gspo", "sample_mean"),
    "gspo": lambda b: verl_step(b, "gspo", "token_mean"),
    "cispo": lambda b: verl_step(b, "cispo", "token_mean"),
    "sapo sample_mean": lambda b: verl_step(b, "sapo", "sample_mean"),
    "dppo_tv": lambda b: verl_step(b, "dppo_tv", "token_mean", clip_ratio_c=20.0),
    "tis": lambda b: verl_step(b, "vanilla", "token_mean", weights_BS=weights_of(b, "token", 2.0)[0]),
    "sequence tis": lambda b: verl_step(b, "vanilla", "token_mean", weights_BS=weights_of(b, "sequence", 2.0)[0]),
    "icepop": lambda b: verl_step(b, "vanilla", "token_mean", weights_BS=weights_of(b, "token", "0.8_1.25")[0]),
    "geometric mask": lambda b: verl_step(b, "vanilla", "token_mean", mask_BS=inverse_mask(b, 0.9, 1.1)),
}


def test_every_golden_value_of_verl_is_computed():
    assert set(GOLDEN) == {name for name, row in STEPS.items() if VERL in row.of}
    assert set(ADVANTAGES) <= set(ESTIMATORS)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_steps(name):
    loss, gradient_BS, _ = GOLDEN[name](golden_batch())
    assert (loss, float(gradient_BS.norm()), float(gradient_BS[0, 0])) == pytest.approx(STEPS[name].numbers, abs=2e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_golden_advantages(name):
    estimate = {**ESTIMATORS, "reinforce_plus_plus": lambda batch: returns(batch, gamma=1.0)}[name]
    advantages_BS = estimate(golden_batch())[0]
    assert advantages_BS[:, 0].tolist() == pytest.approx(list(ADVANTAGES[name]), abs=1e-8)


# ------------------------------------------------------------------------------------------------------- random batches


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages(name, seed):
    batch = random_batch(seed)
    found_BS, returns_BS = advantages(batch, name, OPTIONS.get(name))
    expected_BS, expected_returns_BS = ESTIMATORS[name](batch)
    if name == "gae":
        # verl whitens what it returns, and leaves values on an environment's tokens; miles leaves both to others.
        found_BS = batch.unpacked(whiten(batch.packed(found_BS), batch.packed(batch.mask_BS)))
        returns_BS, expected_returns_BS = (values_BS * batch.mask_BS for values_BS in (returns_BS, expected_returns_BS))
        torch.testing.assert_close(returns_BS, expected_returns_BS.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found_BS * batch.mask_BS, (expected_BS * batch.mask_BS).float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_that_pay_for_kl_token_by_token(seed):
    batch = random_batch(seed, gaps=False)
    kl_BS = core.kl_penalty(batch.old_BS.double(), batch.ref_BS.double(), "k1")
    found_BS, _ = advantages(
        batch, "reinforce_plus_plus", {"gamma": 0.9}, kl_T=batch.packed(kl_BS.float()), kl_coef=0.1
    )
    rewards_BS = token_rewards(batch) - 0.1 * kl_BS * batch.mask_BS
    expected_BS, _ = core.compute_reinforce_plus_plus_outcome_advantage(
        rewards_BS, batch.mask_BS.double(), config=AlgoConfig(gamma=0.9)
    )
    torch.testing.assert_close(found_BS, expected_BS.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "loss", "config"),
    [
        ("vanilla", PPO | {"eps_clip_c": 3.0}, {}),
        ("vanilla", PPO | {"eps_high": None, "eps_clip_c": 1.5}, {"clip_ratio_high": None, "clip_ratio_c": 1.5}),
        ("gspo", GSPO, {}),
        ("cispo", CISPO, {}),
        ("dppo_tv", DPPO, {"clip_ratio_c": 20.0}),
    ],
    ids=["ppo_clip", "ppo_clip of one bound", "gspo", "cispo", "dppo_tv"],
)
def test_losses(name, loss, config, seed, spread):
    batch = random_batch(seed, spread, per_token=name != "gspo")
    if name == "gspo" and spread == FAR:
        batch.old_BS = batch.new_BS + (batch.old_BS - batch.new_BS).clamp(-9, 9)  # verl bounds its log-ratio by 10
    aggregation = list(AVERAGES)[seed]
    step = one_step(batch, policy_loss=loss, loss_aggregation=aggregation, aggregation_constant=CONSTANT)
    loss, gradient_BS, metrics = verl_step(batch, name, aggregation, **config)
    assert_same(step, loss, gradient_BS)
    assert step.metrics["train/pg_clipfrac"] == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-6)
    dual = "train/pg_clipfrac_dual"
    assert step.metrics.get(dual, 0) == pytest.approx(
        metrics["actor/pg_clipfrac_lower"] * (dual in step.metrics), abs=1e-6
    )
    if name != "gspo":  # there verl reports the tokens' divergence, miles the sequences'
        assert step.metrics["train/ppo_kl"] == pytest.approx(metrics["actor/ppo_kl"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_sapo(seed):
    """verl averages it over samples, whatever it is told."""
    batch = random_batch(seed, FAR, per_token=True)
    step = one_step(batch, policy_loss=SAPO, loss_aggregation="sample_mean")
    assert_same(step, *verl_step(batch, "sapo", "token_mean")[:2])


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("ours", "level", "threshold", "normalize"),
    [
        (TIS, "token", 2.0, False),
        (ICEPOP, "token", "0.8_1.25", False),
        (SEQUENCE_TIS, "sequence", 2.0, False),
        (SEQUENCE_TIS | {"level": "token", "normalize": True}, "token", 2.0, True),
        (SEQUENCE_TIS | {"normalize": True}, "sequence", 2.0, True),
    ],
    ids=["tis", "icepop", "sequence", "token, normalised", "sequence, normalised"],
)
def test_weights(ours, level, threshold, normalize, seed, spread):
    batch = random_batch(seed, spread)
    step = one_step(batch, policy_loss=PPO | {"eps_clip_c": 3.0}, loss_aggregation="token_mean", is_correction=ours)
    weights_BS, metrics = weights_of(batch, level, threshold, normalize)
    assert_same(step, *verl_step(batch, "vanilla", "token_mean", weights_BS=weights_BS)[:2])
    if not normalize and level == "token":
        assert step.metrics["is/ratio_mean"] == pytest.approx(
            float((raw_ratios(batch) * batch.mask_BS).sum() / batch.mask_BS.sum()), rel=1e-5
        )
        effective = metrics["rollout_is_eff_sample_size"]
        assert step.metrics["is/effective_sample_size"] == pytest.approx(effective, rel=1e-4)


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("level", "rule"), [("token", "token_k1"), ("sequence", "seq_sum_k1"), ("geometric", "seq_mean_k1")]
)
def test_rejection(level, rule, seed, spread):
    batch = random_batch(seed, spread)
    reject = GEOMETRIC_MASK | {"reject_level": level, "reject_low": 0.7, "reject_high": 1.2}
    step = one_step(batch, policy_loss=PPO | {"eps_clip_c": 3.0}, loss_aggregation="token_mean", is_correction=reject)
    mask_BS = inverse_mask(batch, 0.7, 1.2, rule)
    assert_same(step, *verl_step(batch, "vanilla", "token_mean", mask_BS=mask_BS)[:2])
    dropped = 1 - float(mask_BS.sum() / batch.mask_BS.sum())
    assert step.metrics["is/fraction_rejected"] == pytest.approx(dropped, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_measures_of_the_mismatch(seed):
    batch = random_batch(seed)
    step = one_step(batch, is_correction=GEOMETRIC_MASK)
    columns = (batch.old_BS.double(), batch.rollout_BS.double(), batch.mask_BS.double())
    metrics = correction.compute_offpolicy_metrics(*columns)
    for ours, theirs in {
        "is/k3_kl": "k3_kl",
        "is/chi2_token": "chi2_token",
        "is/chi2_sequence": "chi2_seq",
        "is/log_ppl_diff": "log_ppl_diff",
        "is/log_ppl_abs_diff": "log_ppl_abs_diff",
        "train/train_rollout_kl": "k3_kl",
        "train/train_rollout_chi2": "chi2_token",
    }.items():
        assert step.metrics[ours] == pytest.approx(metrics[theirs], rel=1e-4, abs=1e-6), ours


@pytest.mark.parametrize("spread", [NEAR, 8.0])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("k1", "k1"), ("k2", "k2"), ("low_var_kl", "low_var_kl"), ("low_var_kl", "k3")]
)
def test_kl(ours, theirs, spread):
    """What verl calls k3 is bounded by 10, as `low_var_kl` is here."""
    batch = random_batch(0, spread)
    batch.advantages_BS = torch.zeros_like(batch.advantages_BS)
    step = one_step(batch, policy_loss="reinforce", loss_aggregation="token_mean", kl_loss_coef=1.0, kl_type=ours)
    new_BS = batch.new_BS.double().requires_grad_()
    mask_BS = batch.mask_BS.double()
    loss = core.agg_loss(core.kl_penalty(new_BS, batch.ref_BS.double(), theirs), mask_BS, "token-mean")
    loss.backward()
    assert_same(step, float(loss.detach()), new_BS.grad)


@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss(seed):
    batch = random_batch(seed)
    step = one_step(batch, given=False, advantage_estimator="gae", loss_aggregation="token_mean")
    _, returns_BS = advantages(batch, "gae")
    values_BS = batch.new_values_BS.clone().requires_grad_()
    loss, clipped = core.compute_value_loss(values_BS, returns_BS, batch.values_BS, batch.mask_BS, cliprange_value=0.2)
    loss.backward()
    assert step.metrics["critic/value_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert step.metrics["critic/value_clipfrac"] == pytest.approx(float(clipped), abs=1e-6)
    torch.testing.assert_close(step.value_gradient_BS, values_BS.grad, atol=1e-7, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- where it disagrees


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_a_group_of_one_has_no_baseline(name):
    rewards, mask, index = (
        torch.tensor([[0.7], [0.0], [1.0]]),
        torch.ones(3, 1),
        np.array(["a", "b", "b"], dtype=object),
    )
    found = getattr(core, f"compute_{name}_outcome_advantage")(rewards, mask, index=index, epsilon=0.0)[0]
    if name == "reinforce_plus_plus_baseline":
        relative = torch.tensor([0.7, -0.5, 0.5])
        expected = (relative - relative.mean()) / relative.std()
        assert found.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    else:
        assert float(found[0]) == pytest.approx(0.7)


def test_rewards_that_agree_leave_noise():
    """0.1 and the mean of seven times 0.1 are not the same float32, and epsilon is small."""
    rewards, index = torch.full((7, 1), 0.1), np.array(["a"] * 7, dtype=object)
    found = core.compute_grpo_outcome_advantage(rewards, torch.ones(7, 1), index)[0]
    assert found.abs().max() > 1e-3


def test_dual_clip_is_always_on():
    batch = golden_batch()
    batch.old_BS = batch.new_BS - math.log(4)
    negative = batch.advantages_BS.clamp(max=0).sum() / batch.mask_BS.sum()
    positive = batch.advantages_BS.clamp(min=0).sum() / batch.mask_BS.sum()
    assert verl_step(batch, "vanilla", "token_mean")[0] == pytest.approx(
        float(-3 * negative - 1.28 * positive), rel=1e-6
    )


def test_truncation_of_dppo_is_the_bound_of_dual_clip():
    """3 if nothing is said, where the paper has 20."""
    batch = golden_batch()
    batch.new_BS = batch.new_BS - 5
    batch.old_BS = batch.new_BS - math.log(10)
    gradient_BS = verl_step(batch, "dppo_tv", "token_mean")[1]
    torch.testing.assert_close(gradient_BS, (-3 * batch.advantages_BS / batch.mask_BS.sum()).double())


def test_sapo_knows_one_average():
    batch = golden_batch()
    assert verl_step(batch, "sapo", "token_mean")[0] == verl_step(batch, "sapo", "sample_mean")[0]


def test_bounds_of_k1_are_those_of_the_inverse_ratio():
    batch = golden_batch()
    batch.rollout_BS = batch.old_BS - math.log(1.5)  # old / rollout is 1.5
    assert mask_of(batch, "token_k1", 0.5, 1.2).sum() == batch.mask_BS.sum()
    batch.rollout_BS = batch.old_BS + math.log(1.5)
    assert mask_of(batch, "token_k1", 0.5, 1.2).sum() == 0


def test_what_is_rejected_leaves_the_average_too():
    batch = golden_batch()
    mask_BS = inverse_mask(batch, 0.9, 1.1)
    columns = (batch.old_BS.double(), batch.new_BS.double(), batch.advantages_BS.double(), mask_BS)
    config = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 2}
    config |= {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    loss = core.get_policy_loss_fn("vanilla")(*columns, loss_agg_mode="token-mean", config=ActorConfig(**config))[0]
    assert float(loss) == pytest.approx(-0.0616760, abs=1e-7)
    share = float(mask_BS.sum() / batch.mask_BS.sum())
    assert float(loss) * share == pytest.approx(STEPS["geometric mask"].numbers[0], abs=1e-8)


def test_a_sample_without_a_token_leaves_the_mean_over_samples():
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    losses = torch.tensor([[2.0, 4.0], [9.0, 9.0]])
    assert float(core.agg_loss(losses, mask, "seq-mean-token-mean")) == pytest.approx(3.0)


def test_the_constant_is_the_padded_width_if_not_told():
    losses = torch.ones(2, 5)
    assert float(core.agg_loss(losses, torch.ones(2, 5), "seq-mean-token-sum-norm")) == pytest.approx(1.0)
    wide = torch.nn.functional.pad(losses, (0, 5))
    assert float(core.agg_loss(wide, wide, "seq-mean-token-sum-norm")) == pytest.approx(0.5)


def test_gae_whitens_what_it_returns():
    batch = golden_batch()
    found_BS, _ = ESTIMATORS["gae"](batch)
    trained = found_BS[batch.mask_BS > 0]
    assert (float(trained.mean()), float(trained.var())) == pytest.approx((0, 1), abs=1e-6)
