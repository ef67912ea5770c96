"""The driver's half of a training step, with workers that record what they are asked."""

import asyncio
import inspect
import json
import math
import re

import numpy as np
import pytest
import torch

from miles.config import Config
from miles.config.derived import Derived
from miles.errors import NonFiniteError, TrainError
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.training.advantages import AdvantageStage
from miles.training.table import Table
from miles.training.trainer import Trainer
from miles.training.worker import DataShare, StepOutcome
from miles.types import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    TEACHER_LOG_PROBS,
    Advantages,
    Correction,
    Group,
    Prompt,
    Sample,
    Status,
    StepReport,
    routed_experts_column,
)


class Workers:
    """One rank whose log-probs are -0.5 for the actor and -1 for the reference."""

    size = 1

    def __init__(self, skip=False):
        self.calls = []
        self.skip = skip

    async def call_each(self, method, arguments):
        (only,) = arguments
        self.calls.append((method, only))
        if method == "forward":
            role, tables, (want,) = only
            value = -0.5 if role == "actor" else -1.0
            return [[{want: [np.full(n, value, np.float32) for n in t.lengths]} for t in tables]]
        skipped = only[0] == self.skip or self.skip is True
        return [StepOutcome({"train/loss": 2.0}, StepReport(0.7, skipped, 1e-3), 0)]

    def steps(self):
        return [(tables, tokens) for method, (_, tables, tokens) in self.calls if method == "train_step"]


def sample(i, group, reward, length=4, log_prob=-0.5, status=Status.COMPLETED):
    one = Sample.begin(Prompt(id=f"s:{group}", task_set="s", text="x", tokens=[1, 2]), id=i, group_id=group)
    values = {LOSS_MASK: 1} if log_prob is None else {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: log_prob}
    one.append([3] * length, values)
    one.reward, one.status = reward, status
    return one


def groups(rewards=((1, 0), (1, 1)), **kwargs):
    counter = iter(range(100))
    return [
        Group(g, None, [sample(next(counter), g, float(r), **kwargs) for r in members])
        for g, members in enumerate(rewards)
    ]


def make(skip=False, algorithm=None, rollout=None, interval=1, **train):
    config = Config.model_validate(
        {
            "rollout": {"num_rollout": 1, "batch_size": 2, "n_samples_per_prompt": 2, **(rollout or {})},
            "weight_sync": {"interval": interval},
            "algorithm": {"advantage_estimator": "grpo", **(algorithm or {})},
            "train": train,
            "data": {"sets": [{"name": "s", "path": "x.jsonl"}]},
        }
    )
    workers = Workers(skip)
    shares = [DataShare(0, together=False)]
    registry = Registry(load_plugins())
    return Trainer(config, Derived.of(config), registry, workers, shares, on_policy=config.on_policy), workers


def stage(**estimators):
    """An `AdvantageStage` with the first of these as estimator and the others as terms."""
    registry = Registry(load_plugins())
    for name, function in estimators.items():
        registry.add("advantage_estimators", name, function)
    first, *terms = estimators
    algorithm = {"advantage_estimator": first, "advantage_terms": terms}
    return AdvantageStage(Config.model_validate({"algorithm": algorithm}), registry)


def step(trainer, batch):
    return asyncio.run(trainer.step(batch))


def test_one_optimizer_step_needs_no_extra_forward_and_measures_the_mismatch_inside():
    trainer, workers = make()
    metrics = step(trainer, groups())
    assert [method for method, _ in workers.calls] == ["train_step"]
    ((tables, tokens),) = workers.steps()
    columns = tables[0].columns
    assert "old_log_probs" not in columns
    assert tokens == 16
    assert np.stack(columns["mismatch_weights"])[:, 2:].tolist() == [[1 / 16] * 4] * 4
    half = math.sqrt(0.5)  # rewards 1 and 0: mean 0.5, unbiased std sqrt(0.5)
    advantages = np.stack(columns["advantages"])[:, 2:]
    assert advantages == pytest.approx(np.array([[half], [-half], [0], [0]]).repeat(4, 1), abs=1e-5)
    assert np.stack(columns["weights"])[:, 2:] == pytest.approx(np.full((4, 4), 1 / 16))
    assert np.stack(columns["weights"])[:, :2].tolist() == [[0, 0]] * 4
    assert (metrics["train/loss"], metrics["train/grad_norm"], metrics["train/lr"]) == (2.0, 0.7, 1e-3)


def test_a_number_that_some_ranks_alone_report_is_added_up():
    trainer, _ = make()
    trainer.shares = [0, 1]

    class Two:
        async def call_each(self, method, arguments):
            report = StepReport(0.7, False, 1e-3)
            return [
                StepOutcome({"train/loss": 2.0}, report, 0),
                StepOutcome({"train/x": 1.0, "train/loss": 1.0}, report, 0),
            ]

    trainer.workers = Two()
    metrics = step(trainer, groups())
    assert (metrics["train/loss"], metrics["train/x"]) == (3.0, 1.0)


def test_several_optimizer_steps_recompute_the_old_log_probs_once():
    trainer, workers = make(num_steps_per_rollout=2)
    metrics = step(trainer, groups(log_prob=-0.6))
    assert [method for method, _ in workers.calls] == ["forward", "train_step", "train_step"]
    assert metrics["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.1, abs=1e-6)
    for tables, _ in workers.steps():
        assert np.stack(tables[0].columns["old_log_probs"]).tolist() == [[-0.5] * 6] * 2
        assert not tables[0].has("mismatch_weights")
        assert np.concatenate(tables[0].columns["weights"]).sum() == pytest.approx(1.0)


def test_old_log_probs_from_the_rollout():
    trainer, workers = make(algorithm={"old_logprobs": "rollout"}, num_steps_per_rollout=2)
    metrics = step(trainer, groups(log_prob=-0.25))
    assert [method for method, _ in workers.calls] == ["train_step", "train_step"]
    assert workers.steps()[0][0][0].columns["old_log_probs"][0][2:].tolist() == [-0.25] * 4
    measured = [tables[0].has("mismatch_weights") for tables, _ in workers.steps()]
    assert measured == [True, False]  # before anything was updated
    assert "train/train_rollout_logprob_abs_diff" not in metrics  # absent rather than a false 0


@pytest.mark.parametrize(
    ("rollout", "interval", "off_policy"),
    [
        ({}, 1, False),
        ({}, 2, True),
        ({"partial_rollout": True}, 1, True),
        ({"partial_rollout": True, "max_weight_staleness": 0}, 1, False),
        ({"mode": "one_step_off"}, 1, True),
        ({"mode": "fully_async"}, 1, True),
        ({"mode": "fully_async", "max_weight_staleness": 0}, 1, False),
    ],
)
def test_ratios_are_to_the_policy_that_acted_unless_a_correction_sees_to_it(rollout, interval, off_policy):
    trainer, workers = make(rollout=rollout, interval=interval)
    step(trainer, groups(log_prob=-0.25))
    assert [method for method, _ in workers.calls] == ["train_step"]
    assert ("old_log_probs" in workers.steps()[0][0][0].columns) == off_policy
    trainer, workers = make(algorithm={"is_correction": "tis"}, rollout=rollout, interval=interval)
    step(trainer, groups(log_prob=-0.25))
    assert [method for method, _ in workers.calls] == ["forward", "train_step"]
    assert workers.steps()[0][0][0].columns["old_log_probs"][0][2:].tolist() == [-0.5] * 4


def test_rollout_log_probs_that_are_missing_are_named():
    trainer, _ = make(algorithm={"old_logprobs": "rollout"})
    with pytest.raises(TrainError, match="rollout_log_probs of samples; 4 have none"):
        step(trainer, groups(log_prob=None))


def test_a_sample_without_rollout_log_probs_is_left_out_of_the_mismatch_alone():
    trainer, _ = make(num_steps_per_rollout=2)
    batch = groups(log_prob=-0.6)
    batch[0].samples[0] = sample(0, 0, 1.0, log_prob=None)
    assert step(trainer, batch)["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.1, abs=1e-6)


def test_kl_penalties_ask_for_the_reference():
    trainer, workers = make(algorithm={"kl_loss_coef": 0.1})
    step(trainer, groups())
    assert [(m, a[0]) for m, a in workers.calls if m == "forward"] == [("forward", "reference")]
    assert workers.steps()[0][0][0].columns["ref_log_probs"][0].tolist() == [-1.0] * 6


def test_the_experts_of_the_policy_are_sent_to_no_other_model():
    trainer, workers = make(algorithm={"advantage_estimator": "gae", "kl_coef": 0.1, "old_logprobs": "recompute"})
    batch = groups()
    for one in (one for group in batch for one in group.samples):
        one.write(routed_experts_column(2, 1, 8), 0, np.full((5, 2, 1), one.id))
    step(trainer, batch)
    had = [
        (method, call[0], {"rollout_routed_experts" in t.columns for t in call[1]}) for method, call in workers.calls
    ]
    assert had == [
        ("forward", "actor", {True}),
        ("forward", "reference", {False}),
        ("forward", "critic", {False}),
        ("train_step", "critic", {False}),
        ("train_step", "actor", {True}),
    ]
    rows = [column for t in workers.steps()[-1][0] for column in t.columns["rollout_routed_experts"]]
    assert sorted(int(column[0, 0, 0]) for column in rows) == [0, 1, 2, 3]
    assert {(column.dtype.name, column.shape) for column in rows} == {("uint8", (6, 2, 1))}


@pytest.mark.parametrize(("policy", "tokens", "rows"), [("keep", 16, 4), ("mask", 12, 4), ("drop", 12, 3)])
def test_truncated_samples(policy, tokens, rows):
    trainer, workers = make(algorithm={"truncated": policy})
    batch = groups()
    batch[0].samples[0].status = Status.TRUNCATED
    step(trainer, batch)
    ((tables, trained),) = workers.steps()
    assert (trained, sum(map(len, tables))) == (tokens, rows)


def test_micro_batches_respect_the_cap():
    trainer, workers = make(max_tokens_per_gpu=12)
    step(trainer, groups())
    assert [len(table) for table in workers.steps()[0][0]] == [2, 2]


def test_skipped_steps_are_counted_and_too_many_stop_the_run():
    trainer, _ = make(skip=True, max_nonfinite_steps=2)
    assert step(trainer, groups())["train/skipped_steps"] == 1
    step(trainer, groups())
    with pytest.raises(NonFiniteError, match="3 optimizer steps of the actor in a row"):
        step(trainer, groups())


def test_a_critic_that_never_learns_stops_the_run_though_the_policy_does():
    settings = {"skip": "critic", "algorithm": {"advantage_estimator": "gae"}, "max_nonfinite_steps": 2}
    trainer, resumed = make(**settings)[0], make(**settings)[0]
    metrics = [step(trainer, groups()) for _ in range(2)]
    assert [(m["critic/skipped_steps"], m["train/skipped_steps"]) for m in metrics] == [(1, 0)] * 2
    resumed.load_state_dict(json.loads(json.dumps(trainer.state_dict())))
    with pytest.raises(NonFiniteError, match="3 optimizer steps of the critic in a row"):
        step(resumed, groups())


def test_distillation_without_a_teacher_needs_what_one_said_of_every_sample():
    """A sample that brings no such column must not learn from the fill of the others, a log-probability of 0."""
    batch = groups()
    for one in [s for group in batch for s in group.samples][:3]:
        one.declare(TEACHER_LOG_PROBS)
        one.columns[TEACHER_LOG_PROBS.name][:] = -0.5
    trainer, workers = make(algorithm={"advantage_terms": ["distillation"]})
    with pytest.raises(TrainError, match="teacher_log_probs of samples; 1 have none, such as 3"):
        step(trainer, batch)
    assert not workers.steps()


def test_a_reward_that_is_not_finite_is_an_error_before_anything_is_trained():
    trainer, workers = make()
    with pytest.raises(TrainError, match="1 rewards are not finite"):
        step(trainer, groups(rewards=((1, float("nan")), (1, 0))))
    assert not workers.steps()


def test_samples_of_one_trajectory_share_its_reward():
    trainer, _ = make()
    batch = groups(rewards=((1, 0), (1, 1)))
    batch[1].samples[1].rollout_id = batch[1].samples[0].rollout_id
    step(trainer, batch)
    batch[1].samples[1].reward = 0.5
    with pytest.raises(TrainError, match="of rollout 2 one has 1 and sample 3 0.5"):
        step(trainer, batch)


def test_a_batch_with_nothing_to_train_is_skipped_and_too_many_stop_the_run():
    trainer, workers = make(max_nonfinite_steps=1)
    batch = groups()
    for group in batch:
        for one in group.samples:
            one.columns["loss_mask"][:] = 0
    assert step(trainer, batch) == {"train/skipped_batches": 1.0}
    assert not workers.calls
    with pytest.raises(NonFiniteError, match="2 batches in a row had no trainable token"):
        step(trainer, batch)


def test_kl_in_the_reward_lowers_the_reward_of_whole_trajectories():
    trainer, workers = make(algorithm={"kl_coef": 0.1})
    step(trainer, groups(rewards=((1, 0), (1, 1))))
    # k1 is -0.5 - -1 = 0.5 a token, 4 tokens: 0.2 off every reward, which changes no group-relative advantage ...
    plain, plain_workers = make()
    step(plain, groups(rewards=((1, 0), (1, 1))))
    for table, other in zip(workers.steps()[0][0], plain_workers.steps()[0][0], strict=True):
        assert np.stack(table.columns["advantages"]) == pytest.approx(np.stack(other.columns["advantages"]), abs=1e-5)
    # ... but a longer answer pays for more tokens: 1 - 0.4 against 1 - 0.2 with 8 and 4 tokens.
    batch = groups(rewards=((1, 1), (1, 1)))
    batch[0].samples[0] = sample(0, 0, 1.0, length=8)
    trainer, workers = make(algorithm={"kl_coef": 0.1})
    step(trainer, batch)
    advantages = workers.steps()[0][0][0].columns["advantages"]
    half = math.sqrt(0.5)
    assert sorted({round(float(a[-1]), 3) for a in advantages}) == [round(-half, 3), 0.0, round(half, 3)]


def test_whitening():
    from miles.training.statistics import whiten

    values, mask = torch.tensor([1.0, 2, 3, 100]), torch.tensor([1.0, 1, 1, 0])
    assert whiten(values, mask)[:3].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    values[3] = math.nan  # on a token that is not trained an estimator may say anything
    assert whiten(values, mask)[:3].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


def none(inputs):
    return None


def one_a_sample(inputs):
    return inputs.rewards_N


def in_numbers(inputs):
    return inputs.mask_T.long()


def nothing_inside(inputs):
    return Advantages(None)


def beyond_all_bounds(inputs):
    return inputs.mask_T / 0


def fine(inputs):
    return inputs.mask_T.double()


@pytest.mark.parametrize(
    ("estimator", "came"),
    [
        (none, "None (NoneType)"),
        (one_a_sample, "torch.float64 of shape (4,)"),
        (in_numbers, "torch.int64 of shape (24,)"),
        (nothing_inside, "None (NoneType)"),
        (beyond_all_bounds, "values that are not finite on trainable tokens"),
    ],
)
@pytest.mark.parametrize("before", [{}, {"fine": fine}])  # a term is held to the same
def test_what_is_no_advantages_is_said_with_the_place_of_the_estimator(estimator, came, before):
    table = Table.from_groups(groups(), "train")
    with pytest.raises(TrainError) as caught:
        stage(**before, odd=estimator)(table)
    assert str(caught.value) == (
        f"advantage estimator 'odd' ({__file__}:{inspect.getsourcelines(estimator)[1]}) returned {came}; "
        "a floating-point tensor of shape (24,), one value a token, is expected"
    )


def test_an_estimator_that_raises_is_named():
    def broken(inputs):
        return inputs.no_such_thing

    line = inspect.getsourcelines(broken)[1]
    with pytest.raises(
        TrainError, match=rf"^advantage estimator 'broken' \({__file__}:{line}\) raised Attr.*:{line + 1}\)$"
    ):
        stage(broken=broken)(Table.from_groups(groups(), "train"))


def test_terms_are_added_to_the_estimator():
    table = Table.from_groups(groups(), "train")
    stage(fine=fine, again=lambda inputs: 2 * inputs.mask_T)(table)
    assert table.flat("advantages").tolist() == (3 * table.flat("mask")).tolist()


def lost_returns(inputs):
    return Advantages(inputs.mask_T.clone(), inputs.mask_T * math.nan)


def test_returns_that_are_not_finite_are_the_estimators():
    with pytest.raises(TrainError, match="'lost_returns'.*, as returns, returned values that are not finite"):
        stage(lost_returns=lost_returns)(Table.from_groups(groups(), "train"))


@pytest.mark.parametrize(
    ("correct", "came"),
    [
        (lambda train_T, rollout_T, mask_T, bounds: Correction(weights_T=train_T / 0), "not finite on trainable"),
        (lambda train_T, rollout_T, mask_T, bounds: Correction(keep_T=mask_T[1:] > 0), "shape (23,)"),
        (lambda train_T, rollout_T, mask_T, bounds: Correction(weights_T=[1.0]), "(list)"),
        (lambda train_T, rollout_T, mask_T, bounds: train_T, "Tensor; a miles.api.Correction is expected"),
    ],
)
def test_what_is_no_correction_is_said_before_anything_is_trained(correct, came):
    registry = Registry(load_plugins())
    registry.add("is_corrections", "odd", correct)
    config = Config.model_validate({"algorithm": {"is_correction": "odd", "advantage_estimator": "grpo"}})
    table = Table.from_groups(groups())
    table.columns["old_log_probs"] = table.columns["rollout_log_probs"]
    with pytest.raises(TrainError, match=f"correction 'odd' .*returned .*{re.escape(came)}"):
        AdvantageStage(config, registry)(table)
