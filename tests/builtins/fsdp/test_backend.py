"""The backend's numbers against transformers' own, and their invariances: packing, padding, splits, order."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from miles.builtins.fsdp.model import initial_weights
from miles.builtins.fsdp.norms import fuse_norms
from miles.errors import ConfigError
from miles.training.packing import plan_micro_batches, split_by_sample, split_micro_batch
from miles.types import LossResult, Outputs

LOG_PROBS = frozenset({"log_probs"})


def transformers_twin(backend):
    """The same model, built and run by transformers alone."""
    lm = AutoModelForCausalLM.from_config(backend.context.hf_config, attn_implementation="eager", dtype=torch.float32)
    weights = {name: tensor for group in initial_weights(backend.context) for name, tensor in group.items()}
    lm.load_state_dict(weights, strict=False)
    lm.tie_weights()
    return lm.eval()


def reference_log_probs(lm, tokens, temperature=1.0):
    """Each token's log-probability, one sample alone, straight from the definition."""
    logits = lm(torch.as_tensor(tokens)[None]).logits[0].double() / temperature
    log_p = logits[:-1].log_softmax(-1).gather(-1, torch.as_tensor(tokens)[1:, None])[:, 0]
    return torch.cat([torch.zeros(1, dtype=torch.float64), log_p])


def padded_log_probs(lm, samples):
    """A right-padded batch through transformers with its own attention mask."""
    longest = max(map(len, samples))
    ids = torch.stack([torch.nn.functional.pad(torch.as_tensor(s), (0, longest - len(s))) for s in samples])
    mask = torch.stack([(torch.arange(longest) < len(s)).long() for s in samples])
    log_p = lm(ids, attention_mask=mask).logits.log_softmax(-1)
    picked = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return [torch.cat([torch.zeros(1), row[: len(s) - 1]]) for row, s in zip(picked, samples, strict=True)]


@pytest.fixture(params=["dense", "untied", "sliding", "moe"])
def any_config(request, dense, moe):
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    built = {
        "dense": dense,
        "untied": lambda: dense(tie_word_embeddings=False),
        "sliding": lambda: dense(**window),
        "moe": moe,
    }
    return built[request.param]()


def test_packed_equals_each_sample_alone_and_a_padded_batch(any_config, make_backend, samples, pack):
    backend = make_backend(any_config)
    lm = transformers_twin(backend)
    (outputs,) = backend.forward([pack(samples)], LOG_PROBS)
    packed = split_by_sample(outputs.log_probs_T, pack(samples).bounds)
    with torch.no_grad():
        padded = padded_log_probs(lm, samples)
        for row, sample in enumerate(samples):
            (alone,) = backend.forward([pack(samples, [row])], LOG_PROBS)
            torch.testing.assert_close(packed[row], alone.log_probs_T, atol=1e-6, rtol=0)
            torch.testing.assert_close(packed[row], padded[row], atol=2e-6, rtol=0)
            torch.testing.assert_close(packed[row].double(), reference_log_probs(lm, sample), atol=2e-6, rtol=0)


def test_gradients_equal_those_of_a_padded_batch(any_config, make_backend, samples, pack, weighted, gradients):
    backend = make_backend(any_config)
    lm = transformers_twin(backend)
    batch = pack(samples)
    backend.forward_backward([batch], weighted)
    loss = -(torch.cat(padded_log_probs(lm, samples)) * batch.columns["weights"]).sum()
    loss.backward()
    twin = dict(lm.named_parameters())
    for name, gradient in gradients(backend).items():
        torch.testing.assert_close(gradient, twin[name.removeprefix("lm.")].grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["split", "order", "alone"])
def test_gradients_do_not_depend_on_micro_batches(any_config, way, make_backend, samples, pack, weighted, gradients):
    backend = make_backend(any_config)
    whole = pack(samples)
    backend.forward_backward([whole], weighted)
    expected = gradients(backend)
    backend.zero_grad()
    batches = {
        "split": lambda: list(split_micro_batch(whole)),
        "order": lambda: [pack(samples, [6, 3, 0, 2, 1, 5, 4])],
        "alone": lambda: [pack(samples, [row]) for row in range(len(samples))],
    }[way]()
    backend.forward_backward(batches, weighted)
    for name, gradient in gradients(backend).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=2e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    cap=st.integers(1, 60),
    chunk_size=st.integers(1, 30),
    kind=st.sampled_from(["dense", "moe"]),
)
def test_gradients_do_not_depend_on_any_plan(
    lengths, cap, chunk_size, kind, request, make_backend, pack, weighted, gradients
):
    """Whatever the lengths, the cap of a micro-batch, and the chunks of the head."""
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, 37, length) for length in lengths]
    config = request.getfixturevalue(kind)()
    packed, alone = make_backend(config, train={"log_probs_chunk_size": chunk_size}), make_backend(config)
    packed.forward_backward([pack(samples, rows) for rows in plan_micro_batches(lengths, cap)], weighted)
    alone.forward_backward([pack(samples, [row]) for row in range(len(samples))], weighted)
    found, expected = gradients(packed), gradients(alone)
    norm = float(torch.nn.utils.get_total_norm(list(expected.values())))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6 * max(norm, 1.0), rtol=0)


def test_sums_are_summed_over_micro_batches(make_backend, samples, pack, weighted):
    backend = make_backend()
    whole = backend.forward_backward([pack(samples)], weighted)
    halves = backend.forward_backward(list(split_micro_batch(pack(samples))), weighted)
    assert float(halves["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_fp64_rounds_nothing_to_float32(kind, role, request, make_backend, samples, pack, gradients):
    """Forward and backward of packed samples are those of each sample alone, to 12 digits."""
    config = request.getfixturevalue(kind)(**({"output_router_logits": True} if kind == "moe" else {}))
    want = frozenset({"log_probs", "entropy"} | ({"values"} if role == "critic" else set()))
    found = []
    for plan in ([list(range(len(samples)))], [[row] for row in range(len(samples))]):
        backend = make_backend(config, role=role, train={"dtype": "fp64"})
        backend.scorer.lm.config.router_aux_loss_coef = 0.0  # a balance is that of a micro-batch
        batches = [pack(samples, rows) for rows in plan]
        outputs = backend.forward(batches, want)
        quantities = [torch.cat([getattr(o, f"{name}_T") for o in outputs]) for name in sorted(want)]

        def loss(batch, outputs):
            spoken = outputs.values_T if role == "critic" else outputs.log_probs_T
            return LossResult((spoken**2 * batch.columns["weights"]).sum())

        backend.forward_backward(batches, loss, want)
        found.append([*quantities, *gradients(backend).values()])
    assert all(tensor.dtype == torch.float64 for tensor in found[0])
    for packed, alone in zip(*found, strict=True):
        torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-12)


def test_temperature_divides_the_logits(make_backend, samples, pack):
    backend = make_backend(temperature=0.7)
    (outputs,) = backend.forward([pack(samples, [2])], LOG_PROBS)
    with torch.no_grad():
        expected = reference_log_probs(transformers_twin(backend), samples[2], 0.7)
    torch.testing.assert_close(outputs.log_probs_T.double(), expected, atol=2e-6, rtol=0)


def test_entropy_and_logits_speak_of_the_predicted_token(make_backend, samples, pack):
    backend = make_backend(temperature=0.5)
    (outputs,) = backend.forward([pack(samples, [0, 1])], frozenset({"log_probs", "entropy", "logits"}))
    assert outputs.entropy_T is not None
    assert outputs.logits is not None
    log_p_TV = outputs.logits(1, 9).log_softmax(-1)
    torch.testing.assert_close(outputs.entropy_T[1:9], -(log_p_TV.exp() * log_p_TV).sum(-1), atol=1e-6, rtol=0)
    tokens = torch.as_tensor(samples[0])[1:, None]
    torch.testing.assert_close(outputs.log_probs_T[1:9], log_p_TV.gather(-1, tokens)[:, 0], atol=1e-6, rtol=0)
    assert outputs.entropy_T[0] == outputs.entropy_T[9] == outputs.log_probs_T[9] == 0


def test_losses_reach_entropy_and_logits_with_gradient(make_backend, samples, pack, gradients):
    backend = make_backend()
    want = frozenset({"log_probs", "entropy", "logits"})

    def of_entropy(batch, outputs):
        return LossResult(outputs.entropy_T.sum())

    def of_logits(batch, outputs):
        total = 0.0
        for start in range(0, batch.bounds[-1], 16):
            end = min(start + 16, batch.bounds[-1])
            log_p = outputs.logits(start, end).log_softmax(-1)
            total = total - (log_p.exp() * log_p).sum(-1)[batch.positions_T[start:end] > 0].sum()
        return LossResult(total)

    found = []
    for loss in (of_entropy, of_logits):
        backend.zero_grad()
        backend.forward_backward([pack(samples)], loss, want)
        found.append(gradients(backend))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-5)


def test_a_critic_values_the_state_before_each_token(make_backend, samples, pack):
    backend = make_backend(role="critic")
    (outputs,) = backend.forward([pack(samples)], frozenset({"values"}))
    head = backend.scorer.value_head
    assert head.weight.dtype == torch.float32
    assert 0.01 < float(head.weight.detach().std()) < 0.03
    lm = transformers_twin(backend)
    with torch.no_grad():
        hidden = lm.model(torch.as_tensor(samples[2])[None]).last_hidden_state[0]
        expected = torch.cat([torch.zeros(1), (hidden @ head.weight[0] + head.bias)[:-1]])
    torch.testing.assert_close(split_by_sample(outputs.values_T, pack(samples).bounds)[2], expected, atol=1e-5, rtol=0)


def test_a_critic_learns(make_backend, samples, pack):
    backend = make_backend(role="critic")

    def towards_one(batch, outputs):
        loss = ((outputs.values_T - 1) ** 2 * (batch.positions_T > 0)).sum()
        return LossResult(loss, {"loss": loss.detach()})

    losses = []
    for _ in range(5):
        backend.zero_grad()
        losses.append(float(backend.forward_backward([pack(samples)], towards_one, frozenset({"values"}))["loss"]))
        backend.optim_step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_reference_is_frozen(make_backend):
    backend = make_backend(role="reference")
    assert backend.optimizer is None
    assert not any(p.requires_grad for p in backend.scorer.parameters())


def test_gradient_checkpointing_changes_nothing(any_config, make_backend, samples, pack, weighted, gradients):
    plain, saving = (make_backend(any_config, train={"gradient_checkpointing": on}) for on in (False, True))
    seen = []
    layer = type(saving.scorer.lm.model.layers[0].mlp)
    original = layer.forward
    for backend in (plain, saving):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "forward", lambda self, x, calls=calls: calls.append(1) or original(self, x))
            backend.forward_backward([pack(samples)], weighted)
        seen.append(len(calls))
    assert seen[1] == 2 * seen[0]
    for name, gradient in gradients(saving).items():
        assert torch.equal(gradient, gradients(plain)[name])


def test_dropout_is_off(dense, make_backend, samples, pack, weighted, gradients):
    backend = make_backend(dense(attention_dropout=0.5), train={"gradient_checkpointing": True})
    found = []
    for _ in range(2):
        backend.zero_grad()
        backend.forward_backward([pack(samples)], weighted)
        found.append(gradients(backend))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_router_balance_is_off_unless_the_config_asks(moe, make_backend, samples, pack, weighted):
    assert "train/router_balance" not in make_backend(moe()).forward_backward([pack(samples)], weighted)


def test_router_balance_is_that_of_transformers(moe, make_backend, samples, pack, weighted, gradients):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    backend = make_backend(moe(output_router_logits=True, router_aux_loss_coef=0.1))
    seen: list[Outputs] = []

    def listening(batch, outputs):
        seen.append(outputs)
        return weighted(batch, outputs)

    sums = backend.forward_backward([pack(samples)], listening)
    with_balance = gradients(backend)
    tokens = torch.as_tensor(np.concatenate(samples))[None]
    positions = torch.cat([torch.arange(len(s)) for s in samples])[None]
    lm = transformers_twin(backend)
    lm.set_attn_implementation("sdpa")
    logits = lm.model(tokens, position_ids=positions, output_router_logits=True, use_cache=False).router_logits
    expected = 0.1 * load_balancing_loss_func(logits, 4, 2)
    assert float(sums["train/router_balance"]) == pytest.approx(expected.item(), rel=1e-5)
    assert seen[0].aux_losses["router_balance"].item() == pytest.approx(expected.item(), rel=1e-5)
    backend.scorer.lm.config.router_aux_loss_coef = 0.0
    backend.zero_grad()
    backend.forward_backward([pack(samples)], weighted)
    assert any(not torch.equal(with_balance[n], g) for n, g in gradients(backend).items() if "gate" in n)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_same_inputs_same_bits(any_config, make_backend, samples, pack, weighted):
    """And every kernel on the way has a deterministic form."""
    ends = []
    for _ in range(2):
        backend = make_backend(any_config)
        for _ in range(2):
            backend.zero_grad()
            backend.forward_backward(list(split_micro_batch(pack(samples))), weighted)
            backend.optim_step()
        ends.append({name: tensor.clone() for group in backend.named_weights() for name, tensor in group.items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("kind", ["dense", "balanced mixture", "critic"])
@pytest.mark.parametrize("prompt", [0, 6])
def test_an_empty_micro_batch_adds_nothing(kind, prompt, moe, make_backend, samples, pack, gradients):
    """To the bit: not to the loss, gradients, the balance of routers or what is said of other micro-batches."""
    want = frozenset({"values"} if kind == "critic" else {"log_probs", "entropy"})

    def all_of_it(batch, outputs):
        terms = [(getattr(outputs, f"{name}_T") * batch.columns["weights"]).sum() for name in sorted(want)]
        return LossResult(sum(terms), {"loss": sum(terms).detach()})

    def learned(*batches):
        config = moe(output_router_logits=True, router_aux_loss_coef=0.3) if kind == "balanced mixture" else None
        backend = make_backend(config, role="critic" if kind == "critic" else "actor")
        said = backend.forward([*batches], want)
        sums = backend.forward_backward([*batches], all_of_it, want)
        return gradients(backend), {**sums, "total": backend.loss_total}, [getattr(said[0], f"{n}_T") for n in want]

    alike = [np.concatenate([np.arange(prompt), sample]) for sample in samples]
    whole, empty = replace(pack(alike), shared=[0, *[prompt] * (len(alike) - 1)]), pack(alike, [])
    expected, found = learned(whole), learned(whole, empty)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    (none, sums, _) = learned(empty)
    assert not any(value.any() for value in (*none.values(), *sums.values()))


def test_log_probs_chunks_do_not_matter(make_backend, samples, pack, weighted, gradients):
    whole, chunked = make_backend(), make_backend(train={"log_probs_chunk_size": 5})
    for backend in (whole, chunked):
        backend.forward_backward([pack(samples)], weighted)
    for name, gradient in gradients(chunked).items():  # float32 sums, in an order that depends on threads too
        torch.testing.assert_close(gradient, gradients(whole)[name], atol=2e-6, rtol=1e-5)


def test_models_that_change_their_logits_are_refused(dense, make_backend):
    config = dense()
    config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        make_backend(config)


@pytest.mark.parametrize("attention", ["flex", "flash"])
def test_kernels_that_cannot_run_here_say_so(attention, make_backend):
    with pytest.raises(ConfigError, match="sdpa"):
        make_backend(train={"attention": attention})


def test_named_weights_are_those_of_the_checkpoint(any_config, make_backend):
    backend = make_backend(any_config)
    sent = {name: tensor for group in backend.named_weights() for name, tensor in group.items()}
    first = {name: tensor for group in initial_weights(backend.context) for name, tensor in group.items()}
    assert sent.keys() == first.keys()
    assert all(torch.equal(sent[name], first[name]) for name in sent)
    assert math.isclose(sum(t.numel() for t in sent.values()), sum(p.numel() for p in backend.scorer.lm.parameters()))


def test_norms_are_fused_where_they_compute_the_same():
    size = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**size, **heads))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens).logits
    assert fuse_norms(model) == 2 * 4 + 1
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-6, rtol=1e-6)
    assert fuse_norms(Gemma2ForCausalLM(Gemma2Config(**size, **heads))) == 0
