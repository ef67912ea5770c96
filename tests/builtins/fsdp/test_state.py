"""Offload and onload without a trace; weights from a checkpoint."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3ForSequenceClassification

from miles.builtins.fsdp.backend import FsdpBackend
from miles.builtins.fsdp.model import initial_weights, one_by_one
from miles.builtins.fsdp.state import ORDER
from miles.builtins.parking import Pages, Parking
from miles.errors import TrainError

EVERYTHING = frozenset({"parameters", "gradients", "optimizer"})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [{}, {"reproducible_ranks": 1}])
def test_offloading_leaves_no_trace(dtype, more, make_backend, samples, pack, weighted, tensors, same):
    still, moved = (make_backend(train={"dtype": dtype, **more}) for _ in range(2))
    moved.presence.moves = True  # as on CUDA
    for backend in (still, moved):
        backend.forward_backward([pack(samples)], weighted)
    expected = tensors(still)
    moved.offload(EVERYTHING)
    moved.offload(EVERYTHING)
    away = [tensor for name, tensor in moved._state().items() if name != "steps"]
    assert {tensor.untyped_storage().nbytes() for tensor in away} == {0}
    moved.onload(frozenset({"parameters"}))
    moved.onload(EVERYTHING)
    assert same(tensors(moved), expected)
    assert still.optim_step() == moved.optim_step()
    assert same(tensors(still), tensors(moved))


def test_the_host_holds_what_is_parked_and_no_more(make_backend, samples, pack, weighted):
    """Rounded up to pages, whatever moves how often: two models that take turns need the pages of one."""
    backends, pages = (make_backend(train={"dtype": "bf16"}), make_backend()), Pages(page_bytes=4096)
    for backend in backends:
        backend.presence.moves = True
        backend.presence._parking = {part: Parking(pages) for part in ORDER}
    for _ in range(3):
        for backend in backends:
            backend.zero_grad()
            backend.forward_backward([pack(samples)], weighted)
            backend.offload(frozenset({"optimizer"}))
            backend.offload(frozenset({"gradients", "parameters"}))
            backend.onload(frozenset({"parameters", "optimizer", "gradients"}))
    numbers = sum(parameter.numel() for parameter in backends[0].scorer.parameters())
    parked = numbers * (2 + 12 + 4)  # bf16; master and moments; gradient
    assert parked <= pages.count * 4096 <= parked + 3 * 4096 + 4 * len(backends[0].optimizer.masters)


def test_gradients_that_are_away_are_not_held(make_backend, samples, pack, weighted):
    backend = make_backend()
    backend.forward_backward([pack(samples)], weighted)
    backend.offload(frozenset({"gradients"}))
    assert all(p.grad is None for p in backend.scorer.parameters())


@pytest.mark.parametrize(
    ("part", "call"),
    [
        ("parameters", lambda b, batch, loss: b.forward([batch], frozenset({"log_probs"}))),
        ("parameters", lambda b, batch, loss: list(b.named_weights())),
        ("gradients", lambda b, batch, loss: b.forward_backward([batch], loss)),
        ("optimizer", lambda b, batch, loss: b.optim_step()),
    ],
)
def test_work_on_what_is_away_is_refused(part, call, make_backend, samples, pack, weighted):
    backend = make_backend()
    backend.offload(frozenset({part}))
    with pytest.raises(TrainError, match=f"{part} are offloaded"):
        call(backend, pack(samples), weighted)


def test_weights_go_out_one_by_one():
    """The next is taken when one is given, and no more than that."""
    taken = []

    def source():
        for number in range(4):
            taken.append(number)
            yield str(number), torch.tensor(number)

    stream = one_by_one(source())
    assert [(next(stream), len(taken)) for _ in range(4)] == [
        ({"0": torch.tensor(0)}, 2),
        ({"1": torch.tensor(1)}, 3),
        ({"2": torch.tensor(2)}, 4),
        ({"3": torch.tensor(3)}, 4),
    ]
    assert list(one_by_one([])) == list(stream) == []


# ------------------------------------------------------------------------------------------------------ initial weights


def from_checkpoint(backend, folder) -> FsdpBackend:
    """The same context, but with the weights that lie in `folder`."""
    context = backend.context
    model = context.config.model.model_copy(update={"random_init": False})
    config = context.config.model_copy(update={"model": model})
    return FsdpBackend(context=type(context)(**{**vars(context), "config": config, "checkpoint": folder}))


def test_weights_come_from_the_checkpoint(make_backend, samples, pack, weighted, tmp_path, step, same):
    trained = make_backend()
    step(trained, pack(samples), weighted)
    sent = {name: tensor.clone() for group in trained.named_weights() for name, tensor in group.items()}
    save_file(sent, tmp_path / "model.safetensors")
    loaded = {
        name: t for group in from_checkpoint(make_backend(), tmp_path).named_weights() for name, t in group.items()
    }
    assert same(sent, loaded)
    repeated = {**sent, "lm_head.weight": sent["model.embed_tokens.weight"].clone()}
    save_file(repeated, tmp_path / "model.safetensors")
    assert same(
        sent, {n: t for group in from_checkpoint(make_backend(), tmp_path).named_weights() for n, t in group.items()}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "lack 1 .*model.norm.weight"),
        (lambda w: w.update(odd=torch.zeros(2)), "'odd'"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"\(3,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, message, make_backend, tmp_path):
    backend = make_backend()
    weights = {name: tensor for group in initial_weights(backend.context) for name, tensor in group.items()}
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(TrainError, match=message):
        from_checkpoint(backend, tmp_path)


def test_a_precision_scheme_is_asked_in_order(make_backend, samples, pack, weighted):
    """`configure` before the model exists, `prepare` before its weights do, `autocast` around every forward."""
    calls = []

    class Scheme:
        def configure(self, backend, model_config):
            calls.append(("configure", backend, model_config["dtype"], model_config["hidden_size"]))

        def prepare(self, model):
            calls.append(("prepare", next(model.parameters()).is_meta))
            return model

        @contextmanager
        def autocast(self):
            calls.append(("autocast",))
            yield

    backend = make_backend(precision=Scheme(), train={"dtype": "bf16", "train_backend": "miles/fsdp"})
    assert calls == [("configure", "miles/fsdp", "bf16", 32), ("prepare", True)]
    backend.forward_backward([pack(samples)], weighted)
    backend.forward([pack(samples)], frozenset({"log_probs"}))
    assert calls[2:] == [("autocast",)] * 2


def test_transforms_freeze_and_wrap(make_backend, samples, pack, weighted, step, same):
    """An adapter wraps the query projection; only the adapter learns; the base keeps its names."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.extra = torch.nn.Linear(base.in_features, base.out_features, bias=False)
            torch.nn.init.zeros_(self.extra.weight)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    class Adapting:
        def prepare(self, model, role):
            for layer in model.model.layers:
                layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
            return model

        def trainable(self, name):
            return ".extra." in name

        def synced(self, groups):
            return groups

    plain, adapted = make_backend(), make_backend(transforms=(Adapting(),))
    want = frozenset({"log_probs"})
    first, second = (b.forward([pack(samples)], want)[0].log_probs_T for b in (plain, adapted))
    assert torch.equal(first, second)
    before = {name: t.clone() for group in adapted.named_weights() for name, t in group.items()}
    assert before.keys() == {name for group in plain.named_weights() for name in group}
    step(adapted, pack(samples), weighted)
    assert same(before, {name: t for group in adapted.named_weights() for name, t in group.items()})
    assert not torch.equal(adapted.forward([pack(samples)], want)[0].log_probs_T, second)
    assert len(adapted.optimizer.masters) == 2


def test_a_critic_may_start_from_a_sequence_classifier(make_backend, dense, samples, pack, tmp_path):
    config = dense(tie_word_embeddings=False, num_labels=1)
    judge = Qwen3ForSequenceClassification(config)
    judge.save_pretrained(tmp_path)
    critic = make_backend(config, role="critic", checkpoint=tmp_path, random_init=False)
    assert torch.equal(critic.scorer.value_head.weight, judge.score.weight)
    assert torch.equal(critic.scorer.lm.model.norm.weight, judge.model.norm.weight)
    (outputs,) = critic.forward([pack(samples)], frozenset({"values"}))
    assert outputs.values_T.isfinite().all()


def test_a_model_takes_the_weights_of_another(make_backend):
    first, second = make_backend(), make_backend(role="critic", optimizer={"lr": 0.1})
    head = second.scorer.value_head.weight.clone()
    with torch.no_grad():
        for parameter in first.scorer.parameters():
            parameter.add_(1)
    second.take_weights(first.named_weights())
    assert all(torch.equal(p, second.scorer.get_parameter(n)) for n, p in first.scorer.named_parameters())
    assert torch.equal(second.scorer.value_head.weight, head)
