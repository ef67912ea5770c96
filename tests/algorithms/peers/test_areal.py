"""miles against AReaL on random batches: losses with gradient and metrics, corrections, M2PO, group statistics, the
critic's loss; and its golden values again."""

import math

import pytest
import torch
from golden import AREAL, GSPO, ICEPOP, PPO, SAPO, STEPS, TIS, assert_same, peer
from onestep import advantages, golden_batch, one_step, random_batch

functional = peer("areal.utils.functional.functional")
arguments = peer("areal.api.cli_args")
data = peer("areal.utils.data")
actor = peer("areal.trainer.ppo.actor")
pytestmark = pytest.mark.peers

SEEDS = range(4)
NEAR, FAR = 0.3, 1.0


def areal_step(batch, rejection=None, level="token", high=0.28, c_clip=None):
    """AReaL's loss, an average over tokens, in float64; with `rejection`, of three policies."""
    new_BS = batch.new_BS.double().requires_grad_()
    loss, facts = functional.ppo_actor_loss_fn(
        new_BS,
        batch.old_BS.double(),
        (batch.old_BS if rejection is None else batch.rollout_BS).double(),
        batch.advantages_BS.double(),
        0.2,
        batch.mask_BS.bool(),
        eps_clip_higher=high,
        c_clip=c_clip,
        rejection_sampling=rejection and arguments.RejectionSamplingConfig(**rejection),
        importance_sampling_level=level,
    )
    loss.backward()
    return float(loss.detach()), new_BS.grad, facts


def areal_sapo(batch):
    new_BS = batch.new_BS.double().requires_grad_()
    columns = (batch.old_BS.double(), batch.advantages_BS.double(), 1.0, 1.05, batch.mask_BS.bool())
    loss, facts = functional.sapo_loss_fn(new_BS, *columns)
    loss.backward()
    return float(loss.detach()), new_BS.grad, facts


CLAMP = {"level": "token", "action": "clamp", "metric": "ratio", "upper": 2.0}
MASK = {"level": "token", "action": "mask", "metric": "ratio", "lower": 0.8, "upper": 1.25}

# -------------------------------------------------------------------------------------------------------- golden values

GOLDEN = {
    "ppo_clip": lambda b: areal_step(b),
    "gspo": lambda b: areal_step(b, level="sequence"),
    "sapo": lambda b: areal_sapo(b),
    "tis": lambda b: areal_step(b, CLAMP),
    "icepop": lambda b: areal_step(b, MASK),
}


def test_every_golden_value_of_areal_is_computed():
    assert set(GOLDEN) == {name for name, row in STEPS.items() if AREAL in row.of}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_steps(name):
    """AReaL's weights are float32."""
    loss, gradient_BS, _ = GOLDEN[name](golden_batch())
    found = (loss, float(gradient_BS.norm()), float(gradient_BS[0, 0]))
    assert found == pytest.approx(STEPS[name].numbers, abs=1e-8 if name in ("tis", "icepop") else 2e-9)


# ------------------------------------------------------------------------------------------------------- random batches


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (PPO, {}),
        (PPO | {"eps_high": None}, {"high": None}),
        (PPO | {"eps_clip_c": 3.0}, {"c_clip": 3.0}),
        (GSPO, {"level": "sequence"}),
    ],
    ids=["ppo_clip", "ppo_clip of one bound", "ppo_clip with dual clip", "gspo"],
)
def test_losses(loss, other, seed, spread):
    batch = random_batch(seed, spread, per_token=loss["name"] == "ppo_clip")
    step = one_step(batch, policy_loss=loss, loss_aggregation="token_mean")
    expected, gradient_BS, facts = areal_step(batch, **other)
    assert_same(step, expected, gradient_BS)
    tokens = float(batch.mask_BS.sum())
    assert step.metrics["train/pg_clipfrac"] == pytest.approx(float(facts["clip_mask"].sum()) / tokens, abs=1e-6)
    if "c_clip" in other:
        dual = float(facts["dual_clip_mask"].sum()) / tokens
        assert step.metrics["train/pg_clipfrac_dual"] == pytest.approx(dual, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_sapo(seed):
    batch = random_batch(seed, FAR, per_token=True)
    assert_same(one_step(batch, policy_loss=SAPO, loss_aggregation="token_mean"), *areal_sapo(batch)[:2])


@pytest.mark.parametrize("spread", [NEAR, FAR])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ours", "rejection"), [(TIS, CLAMP), (ICEPOP, MASK)], ids=["tis", "icepop"])
def test_corrections(ours, rejection, seed, spread):
    batch = random_batch(seed, spread)
    step = one_step(batch, policy_loss=PPO, loss_aggregation="token_mean", is_correction=ours)
    assert_same(step, *areal_step(batch, rejection)[:2])


@pytest.mark.parametrize("threshold", [1e-6, 0.01, 0.04, 0.2, 100.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_m2po(seed, threshold):
    batch = random_batch(seed)
    step = one_step(
        batch,
        policy_loss="reinforce",
        loss_aggregation="token_mean",
        is_correction={"name": "m2po", "threshold": threshold},
    )
    mask_BS = batch.mask_BS.bool()
    keep_BS = actor._apply_m2po_masking(batch.rollout_BS.double(), batch.old_BS.double(), mask_BS, threshold)
    torch.testing.assert_close(step.gradient_BS, -batch.advantages_BS * keep_BS / mask_BS.sum())
    dropped = 1 - float(keep_BS.sum() / mask_BS.sum())
    assert step.metrics["is/fraction_rejected"] == pytest.approx(dropped, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("grpo", {"epsilon": 1e-5}, {"std_level": "group"}),
        ("dr_grpo", {}, {"std_level": None}),
        ("rloo", {}, {"std_level": None, "mean_leave1out": True}),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_advantages(name, options, config, seed):
    batch = random_batch(seed)
    normalize = data.Normalization(arguments.NormConfig(mean_level="group", group_size=4, **config))
    expected_B = normalize(batch.rewards_B.double())
    found_BS, _ = advantages(batch, name, options)
    torch.testing.assert_close(found_BS, expected_B[:, None] * batch.mask_BS, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl(kind, seed):
    batch = random_batch(seed)
    batch.advantages_BS = torch.zeros_like(batch.advantages_BS)
    step = one_step(batch, policy_loss="reinforce", loss_aggregation="token_mean", kl_loss_coef=1.0, kl_type=kind)
    new_BS = batch.new_BS.clone().requires_grad_()
    loss = (data.KLEstimator(kind)(new_BS, batch.ref_BS) * batch.mask_BS).sum() / batch.mask_BS.sum()
    loss.backward()
    assert_same(step, float(loss.detach()), new_BS.grad.double())


@pytest.mark.parametrize("clip", [0.2, 1e9])
@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss(seed, clip):
    batch = random_batch(seed)
    step = one_step(
        batch, given=False, advantage_estimator="gae", loss_aggregation="token_mean", critic={"value_clip": clip}
    )
    _, returns_BS = advantages(batch, "gae")
    values_BS = batch.new_values_BS.clone().requires_grad_()
    mask_BS = batch.mask_BS.bool()
    loss, facts = functional.ppo_critic_loss_fn(values_BS, batch.values_BS, returns_BS, clip, mask_BS)
    loss.backward()
    assert step.metrics["critic/value_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(step.value_gradient_BS, values_BS.grad, atol=1e-7, rtol=1e-4)
    share = float(facts["clip_mask"].sum() / mask_BS.sum())
    assert step.metrics["critic/value_clipfrac"] == pytest.approx(share, abs=1e-6)


# --------------------------------------------------------------------------------------------------- where it disagrees


@pytest.mark.parametrize("std_level", ["group", None])
def test_a_group_of_one_says_nothing(std_level):
    normalize = data.Normalization(arguments.NormConfig(mean_level="group", std_level=std_level, group_size=1))
    assert normalize(torch.tensor([0.7, 1.0])).tolist() == [0.0, 0.0]


def test_a_weight_of_a_sequence_is_its_geometric_mean():
    batch = golden_batch()
    batch.rollout_BS = batch.old_BS - 0.01
    bounds = {"level": "sequence", "action": "mask", "metric": "ratio", "agg": "mean", "lower": 0.5, "upper": 2.0}
    weights_BS = areal_step(batch, bounds)[2]["behave_imp_weight"]
    torch.testing.assert_close(weights_BS, math.exp(0.01) * batch.mask_BS)


def test_every_kl_is_bounded():
    batch = golden_batch()
    far_BS = batch.new_BS - 30
    for kind in ("k1", "k2", "k3"):
        assert data.KLEstimator(kind)(batch.new_BS, far_BS).unique().tolist() == [10.0]


def test_a_ratio_that_overflows_is_no_number():
    batch = golden_batch()
    batch.old_BS = batch.new_BS - 800
    assert areal_step(batch)[1].isnan().any()


def test_ties_at_the_cut_are_parted():
    """Of four tokens equally far off, M2PO drops one here."""
    rollout = torch.zeros(1, 6, dtype=torch.float64)
    train = torch.tensor([[0.4, 0.4, 0.4, 0.4, 0.0, 0.0]], dtype=torch.float64)
    kept = actor._apply_m2po_masking(rollout, train, torch.ones(1, 6, dtype=torch.bool), 0.1)
    assert int(kept.sum()) == 5
