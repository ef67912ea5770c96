"""Steps, schedule, clipping, skipping, and bf16 with masters."""

import math

import pytest
import torch
from torch import nn

from miles.builtins.fsdp.optimizer import Optimizer
from miles.builtins.fsdp.schedule import learning_rate
from miles.config.optimizer import OptimizerSection
from miles.errors import TrainError
from miles.types import LossResult

# ----------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        # warm-up of 2 to 1.0, then 4 steps down to 0.2
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2, 0.2]),
    ],
)
@pytest.mark.parametrize("decay_steps", [6, None])
def test_schedules_by_hand(shape, rates, decay_steps):
    section = OptimizerSection(lr=1.0, lr_schedule=shape, lr_warmup_steps=2, lr_decay_steps=decay_steps, min_lr=0.2)
    total = 100 if decay_steps else 6
    assert [learning_rate(step, section, total) for step in range(8)] == pytest.approx(rates)


# -------------------------------------------------------------------------------------------------------------- steps


def make(section=None, dtype=torch.float32):
    torch.manual_seed(0)
    parameters = {
        "matrix": nn.Parameter(torch.randn(3, 4, dtype=dtype)),
        "vector": nn.Parameter(torch.ones(4, dtype=dtype)),
    }
    given = {"lr": 0.1, "clip_grad": 0.0, **(section or {})}
    return Optimizer(parameters, OptimizerSection(**given), total_steps=10), parameters


def backward(parameters, scale=1.0):
    (scale * sum((p.float() ** 3).sum() for p in parameters.values())).backward()


def test_adamw_by_hand():
    """The first step of Adam is `lr * g / (|g| + eps)`; decay multiplies matrices alone by `1 - lr * decay`."""
    optimizer, parameters = make({"weight_decay": 0.5})
    before = {name: p.detach().clone() for name, p in parameters.items()}
    backward(parameters)
    optimizer.step(torch.zeros(()))
    expected = before["matrix"] * (1 - 0.1 * 0.5) - 0.1 * (3 * before["matrix"] ** 2).sign()
    torch.testing.assert_close(parameters["matrix"].detach(), expected)
    torch.testing.assert_close(parameters["vector"].detach(), torch.full((4,), 0.9))


def test_three_steps_equal_torch():
    optimizer, parameters = make({"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "clip_grad": 0.7})
    _, twins = make()
    torch_adamw = torch.optim.AdamW(
        [{"params": [twins["matrix"]], "weight_decay": 0.1}, {"params": [twins["vector"]], "weight_decay": 0.0}],
        lr=0.1,
        betas=(0.8, 0.9),
        eps=1e-6,
        foreach=False,
    )
    for _ in range(3):
        optimizer.zero_grad()
        torch_adamw.zero_grad()
        backward(parameters)
        backward(twins)
        norm = nn.utils.clip_grad_norm_(list(twins.values()), 0.7)
        torch_adamw.step()
        report = optimizer.step(torch.zeros(()))
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, twins[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("clip", "norm_after"), [(0.0, 30.0), (5.0, 5.0), (100.0, 30.0)])
def test_the_reported_norm_is_before_clipping(clip, norm_after):
    optimizer, parameters = make({"clip_grad": clip})
    parameters["matrix"].grad = torch.zeros(3, 4)
    parameters["vector"].grad = torch.full((4,), 15.0)
    assert optimizer.step(torch.zeros(())).grad_norm == 30.0
    assert float(parameters["vector"].grad.norm()) == pytest.approx(norm_after, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_skips_the_step_and_nothing_else(bad, where):
    optimizer, parameters = make({"lr_schedule": "linear"})
    backward(parameters)
    first = optimizer.step(torch.zeros(()))
    kept = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    if where == "gradient":
        parameters["vector"].grad[1] = bad
    report = optimizer.step(torch.tensor(bad if where == "loss" else 0.0))
    assert report.skipped
    assert not first.skipped
    assert optimizer.steps == 1
    assert all(torch.equal(kept[name], tensor) for name, tensor in optimizer.tensors().items())
    assert all(torch.equal(weights[name], p) for name, p in parameters.items())
    optimizer.zero_grad()
    backward(parameters)
    assert optimizer.step(torch.zeros(())).learning_rate == pytest.approx(0.09)


def test_the_state_exists_before_the_first_step():
    optimizer, _ = make()
    state = optimizer.tensors()
    moments = {f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in ("matrix", "vector")}
    assert set(state) == {"steps", *moments}
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    backward(optimizer.parameters)
    optimizer.step(torch.zeros(()))
    assert {name: tensor.data_ptr() for name, tensor in optimizer.tensors().items()} == addresses


def test_learning_rate_zero_changes_nothing():
    optimizer, parameters = make({"lr": 0.0, "weight_decay": 0.5})
    before = {name: p.detach().clone() for name, p in parameters.items()}
    backward(parameters)
    assert not optimizer.step(torch.zeros(())).skipped
    assert all(torch.equal(before[name], p) for name, p in parameters.items())


# --------------------------------------------------------------------------------------------------------------- bf16


def test_masters_collect_gradients_in_float32():
    """256 + 1 is 256 in bfloat16: eight gradients of 1 after one of 256 must not vanish."""
    optimizer, parameters = make(dtype=torch.bfloat16)
    for gradient in [256.0] + [1.0] * 8:
        (parameters["vector"] * gradient).sum().backward()
        assert parameters["vector"].grad is None
    assert optimizer.masters["vector"].grad is not None
    assert optimizer.masters["vector"].grad.tolist() == [264.0] * 4


def test_steps_too_small_for_bfloat16_add_up():
    optimizer, parameters = make({"lr": 1e-3, "beta1": 0.0, "beta2": 0.0}, dtype=torch.bfloat16)
    for _ in range(10):
        optimizer.zero_grad()
        parameters["vector"].sum().backward()
        optimizer.step(torch.zeros(()))
    torch.testing.assert_close(optimizer.masters["vector"].detach(), torch.full((4,), 0.99), atol=1e-6, rtol=0)
    assert parameters["vector"].dtype == torch.bfloat16
    assert torch.equal(parameters["vector"].detach(), optimizer.masters["vector"].detach().bfloat16())


def test_bf16_backend_keeps_what_rounding_loses(make_backend, samples, pack, weighted):
    wide, narrow = make_backend(), make_backend(train={"dtype": "bf16"})
    start = dict(wide.scorer.named_parameters())
    for name, master in narrow.optimizer.masters.items():
        assert torch.equal(master, start[name])
        assert narrow.optimizer.parameters[name].dtype == torch.bfloat16
    rotary = narrow.scorer.lm.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    for backend in (wide, narrow):
        backend.forward_backward([pack(samples)], weighted)
    exact, rounded = wide.optim_step().grad_norm, narrow.optim_step().grad_norm
    assert rounded == pytest.approx(exact, rel=0.05)
    assert all(t.dtype == torch.bfloat16 for group in narrow.named_weights() for t in group.values())


def test_bf16_micro_batches_change_little(make_backend, samples, pack, weighted):
    norms = []
    for plan in ([[0, 1, 2, 3, 4, 5, 6]], [[i] for i in range(7)]):
        backend = make_backend(train={"dtype": "bf16"})
        backend.forward_backward([pack(samples, rows) for rows in plan], weighted)
        norms.append(backend.optim_step().grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


# -------------------------------------------------------------------------------------------------------------- backend


def test_a_loss_that_is_not_finite_skips(make_backend, samples, pack):
    """Even where its gradient is: a clamped or constant term."""
    backend = make_backend()
    before = {name: p.detach().clone() for name, p in backend.scorer.named_parameters()}
    loss = lambda batch, outputs: LossResult(outputs.log_probs_T.sum() + float("inf"))  # noqa: E731
    backend.forward_backward([pack(samples)], loss)
    assert backend.optim_step().skipped
    assert all(torch.equal(before[name], p) for name, p in backend.scorer.named_parameters())
    backend.zero_grad()
    backend.forward_backward([pack(samples)], lambda batch, outputs: LossResult(outputs.log_probs_T.sum()))
    assert not backend.optim_step().skipped


def test_a_reference_cannot_step(make_backend):
    with pytest.raises(TrainError, match="reference"):
        make_backend(role="reference").optim_step()
