"""torch's varlen_attn behind the backend, and how often a compiled layer is compiled.

The kernel is for GPUs; here its place in the dispatcher is taken by plain softmax attention over its arguments, so that
everything above it (the operator, its autograd, what the compiler sees) is torch's own.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError

from miles.builtins.fsdp import attention, compiled, varlen
from miles.builtins.fsdp.attention import PackedLayout
from miles.builtins.fsdp.compiled import decoder_layers
from miles.builtins.fsdp.varlen import flash_packed, varlen_packed
from miles.errors import ConfigError, TrainError
from miles.training.packing import build_micro_batch, take_samples
from miles.types import LossResult

LOG_PROBS = frozenset({"log_probs"})


def stretches(query, key, value, query_bounds, key_bounds, scale, window):
    """Per stretch `[A, L, D]` queries, keys and values, `[A, L, L']` attention weights, and its two slices. Queries and
    keys are aligned at their ends; `window` is (left, right)."""
    for (a, b), (c, d) in zip(pairwise(query_bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        q = query[a:b].transpose(0, 1)
        k, v = (x[c:d].transpose(0, 1).repeat_interleave(query.shape[1] // x.shape[1], 0) for x in (key, value))
        behind = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = behind < 0 if window[0] < 0 else (behind < 0) | (behind > window[0])
        yield q, k, v, (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1), slice(a, b), slice(c, d)


def plain(*args):
    """Softmax attention `[T, A, D]`."""
    return torch.cat([(weights @ v).transpose(0, 1) for _, _, v, weights, _, _ in stretches(*args)])


def plain_gradients(grad, query, key, value, query_bounds, key_bounds, scale, window):
    """With `P` the weights: `dV = P' dO`, `dS = P (dP - sum dP P)` where `dP = dO V'`."""
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for q, k, v, weights, mine, seen in stretches(query, key, value, query_bounds, key_bounds, scale, window):
        upstream = grad[mine].transpose(0, 1)
        of_weights = upstream @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        of_keys, of_values = of_scores.mT @ q, weights.mT @ upstream
        grads[0][mine] = (of_scores @ k).transpose(0, 1)
        for total, part in zip(grads[1:], (of_keys, of_values), strict=True):
            total[seen] = part.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(grads)


@pytest.fixture
def cpu_kernel():
    """`aten::_flash_attention_{forward,backward}` on the CPU."""

    def forward(q, k, v, q_bounds, k_bounds, max_q, max_k, dropout, causal, return_debug_mask, **options):
        assert q_bounds.dtype == k_bounds.dtype == torch.int32
        assert (max_q, max_k) == (int(q_bounds.diff().max()), int(k_bounds.diff().max()))
        window = options["window_size_left"], options["window_size_right"]
        assert window[1] == 0
        assert causal == (window == (-1, 0))
        out = plain(q, k, v, q_bounds, k_bounds, options["scale"], window)
        nothing = torch.zeros(0)
        return out, torch.zeros(q.shape[1], q.shape[0]), nothing, nothing, nothing

    def backward(grad, q, k, v, out, lse, q_bounds, k_bounds, max_q, max_k, dropout, causal, state, unused, **options):
        window = options["window_size_left"], options["window_size_right"]
        return plain_gradients(grad, q, k, v, q_bounds, k_bounds, options["scale"], window)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.fixture
def make_varlen(cpu_kernel, make_backend, monkeypatch):
    """Backends with this kernel, on the CPU."""
    monkeypatch.setattr(attention, "suits_varlen", lambda device, dtype, head_size: True)

    def make(*args, train=None, **kwargs):
        return make_backend(*args, train={"attention": "auto", **(train or {})}, **kwargs)

    return make


def test_spans_by_hand():
    # a prompt of 6 with answers of 2 and 3, then a sample of 4 by itself
    layout = PackedLayout([0, 8, 17, 21], "cpu", [0, 6, 0])
    spans = layout.spans
    assert layout.lengths == [6, 2, 3, 4]
    assert spans.query_bounds.tolist() == [0, 6, 8, 11, 15]
    assert spans.key_bounds.tolist() == [0, 6, 14, 23, 27]
    assert (spans.longest_query, spans.longest_key) == (6, 9)
    assert spans.key_places.tolist() == [*range(6), *range(8), *range(6), 8, 9, 10, *range(11, 15)]


def test_without_shared_prompts_keys_are_where_queries_are():
    spans = PackedLayout([0, 3, 7], "cpu").spans
    assert spans.key_places is None
    assert spans.query_bounds.tolist() == spans.key_bounds.tolist() == [0, 3, 7]


def check(kernel, shared, window):
    """Against attention over each whole sample; with a shared prompt both its readers' gradients reach it."""
    torch.manual_seed(0)
    bounds = [0, 8, 17, 21]
    layout = PackedLayout(bounds, "cpu", shared)
    computed = layout.spans.query_bounds[-1]
    inputs = [torch.randn(1, heads, computed, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    out, _ = kernel(nn.Identity(), *inputs, None, packed=layout, scaling=0.3, sliding_window=window)
    whole = [layout.tree.spread(x[0].transpose(0, 1)) for x in inputs]
    ends = torch.tensor(bounds, dtype=torch.int32)
    expected = plain(*whole, ends, ends, 0.3, (window - 1 if window else -1, 0))
    found = layout.tree.spread(out[0])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(found)
    for grad, wanted in zip(
        torch.autograd.grad((found * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [[], [0, 6, 0]])
def test_each_token_sees_its_own_sample(window, shared, cpu_kernel):
    check(varlen_packed, shared, window)


def draw_batch(generator, vocabulary=37):
    """Groups of samples with a prompt of their own, some of which are worth sharing."""
    samples, masks = [], []
    for _ in range(generator.integers(1, 4)):
        prompt = generator.integers(0, vocabulary, generator.integers(1, 20))
        for _ in range(generator.integers(1, 5)):
            answer = generator.integers(0, vocabulary, generator.integers(1, 20))
            samples.append(np.r_[prompt, answer])
            masks.append(np.r_[np.zeros(len(prompt)), np.ones(len(answer))].astype(np.float32))
    return build_micro_batch(list(range(len(samples))), samples, {"mask": masks})


def close(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


def masked(batch, outputs):
    return LossResult(-(outputs.log_probs_T * batch.columns["mask"]).sum(), {})


def test_fifty_packings_are_a_few_compilations(make_varlen, make_backend, gradients, monkeypatch):
    """With and without gradient one graph for all layers, and one for those before the first shared prompt; and two for
    the logits."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # as often, but no code is made
    fast, plainly = make_varlen(train={"compile": True}), make_backend()
    generator = np.random.default_rng(0)
    batches = [draw_batch(generator) for _ in range(50)]
    shared = [PackedLayout(batch.bounds, "cpu", batch.shared).spans.key_places is not None for batch in batches]
    assert 5 < sum(shared) < 45
    batches.insert(0, batches.pop(shared.index(False)))
    for backend in (fast, plainly):
        backend.forward_backward(batches, masked)
    found, expected = gradients(fast), gradients(plainly)
    for name, gradient in found.items():
        close(gradient, expected[name])
    for a, b in zip(fast.forward(batches, LOG_PROBS), plainly.forward(batches, LOG_PROBS), strict=True):
        torch.testing.assert_close(a.log_probs_T, b.log_probs_T, atol=1e-5, rtol=0)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 5


def test_padding_is_compiled_as_what_came_before_it(make_varlen, monkeypatch):
    """A rank that ran out of memory works on it while others wait."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    backend = make_varlen(train={"compile": True})
    generator = np.random.default_rng(0)
    drawn = [draw_batch(generator) for _ in range(20)]
    shared = [batch for batch in drawn if backend._layout(batch).spans.key_places is not None]
    backend.forward_backward(shared, masked)
    backend.forward(shared, LOG_PROBS)
    compiled_so_far = counters["stats"]["unique_graphs"]
    backend.forward_backward([take_samples(shared[0], 0, 0)] * 2, masked)
    backend.forward([take_samples(shared[0], 0, 0)], LOG_PROBS)
    assert counters["stats"]["unique_graphs"] == compiled_so_far > 0


@pytest.mark.slow
def test_other_kernels_interrupt_a_compiled_layer_and_change_nothing(make_backend, samples, pack, weighted, gradients):
    train = {"gradient_checkpointing": True}
    fast, plainly = (make_backend(train={**train, "compile": compile}) for compile in (True, False))
    for backend in (fast, plainly):
        backend.forward_backward([pack(samples)], weighted)
    for name, gradient in gradients(fast).items():
        close(gradient, gradients(plainly)[name])


def test_what_runs_where():
    cpu = attention.choose("auto", "cpu", torch.bfloat16, 128)
    assert cpu == "sdpa"
    with pytest.raises(ConfigError, match="CUDA"):
        attention.choose("varlen", "cpu", torch.bfloat16, 128)


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn.cute", "flash_attn_interface"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("repeats", [False, True])
def test_flash_is_asked_for_the_right_thing(repeats, window, package, monkeypatch):
    """flash-attn needs a GPU; a stand-in with its signature computes what its arguments say. Later ones
    return more than the result."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        *,
        softmax_scale,
        causal,
        deterministic,
        window_size=(-1, -1),
    ):
        assert causal
        assert deterministic == repeats
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (6, 9)
        assert window_size == ((-1, -1) if window is None else (window - 1, 0))
        out = plain(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size)
        return out if package == "flash_attn" else (out, None)

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: repeats)
    module = ModuleType(package)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, package, module)
    varlen.flash_kernel.cache_clear()
    try:
        check(flash_packed, [0, 6, 0], window)
    finally:
        varlen.flash_kernel.cache_clear()


def test_flash_without_its_package():
    varlen.flash_kernel.cache_clear()
    with pytest.raises(ConfigError, match="--attention varlen"):
        attention.choose("flash", "cuda", torch.bfloat16, 128)


@pytest.mark.parametrize("shape", [(48, 64), (3, 5), (128,)])
def test_a_narrower_gradient_is_added_in_its_own_precision(shape, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled._adding.cache_clear()
    total, part = torch.randn(shape), torch.randn(shape, dtype=torch.bfloat16)
    expected = total + part.float()
    compiled.add_into(total, part)
    compiled._adding.cache_clear()
    assert torch.equal(total, expected)


def test_a_compiled_layer_keeps_what_it_cannot_make_again_cheaply(
    make_varlen, dense, samples, pack, weighted, monkeypatch
):
    """Built in one thread, run in another. Of the MLP of 48 numbers a token keeps two, not their product, too."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    config = dense(intermediate_size=48, num_hidden_layers=1)
    with ThreadPoolExecutor(1) as thread:
        backend = thread.submit(make_varlen, config, train={"compile": True}).result()
    torch._dynamo.reset()
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    (layer,) = decoder_layers(backend.scorer.lm)
    run = layer.forward

    def watched(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return run(*args, **kwargs)

    layer.forward = watched
    backend.forward_backward([pack(samples)], weighted)
    assert shapes.count((sum(map(len, samples)), 48)) == 2


def test_what_cannot_be_compiled_says_how_to_do_without(make_backend, samples, pack, monkeypatch):
    def fails(*args, **kwargs):
        raise InternalTorchDynamoError("no such thing")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fails)
    backend = make_backend(train={"compile": True})
    with pytest.raises(TrainError, match=r"--no-compile .*no such thing"):
        backend.forward([pack(samples)], LOG_PROBS)
