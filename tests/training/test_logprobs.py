"""Chunked log-probabilities against the textbook formula, in float64 and with their gradients."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from miles.training import logprobs
from miles.training.logprobs import (
    _LinearScores,
    align_with_tokens,
    log_probs_from_logits,
    next_tokens,
    selected_log_probs,
)

T, H, V = 11, 6, 13


class Wrapped(nn.Module):
    """A head that is not a plain linear layer, as an adapter makes it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def make(bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
    return hidden, nn.Linear(H, V, bias=bias, dtype=dtype), torch.randint(0, V, (T,))


def textbook(hidden, head, targets, temperature):
    logits = head(hidden) / temperature
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return p[range(T), targets].log(), -(p * p.log()).sum(-1)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, T, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_textbook_with_gradients(wrap, bias, chunk_size, temperature):
    hidden, head, targets = make(bias)
    upstream = torch.randn(2, T, dtype=torch.float64)
    inputs = [hidden, *head.parameters()]
    expected = textbook(hidden, head, targets, temperature)
    expected_grads = torch.autograd.grad((torch.stack(expected) * upstream).sum(), inputs)
    found = selected_log_probs(
        hidden, Wrapped(head) if wrap else head, targets, temperature=temperature, chunk_size=chunk_size, entropy=True
    )
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-12, rtol=0)
    grads = torch.autograd.grad((torch.stack(found) * upstream).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


def test_gradients_numerically():
    hidden, head, targets = make(bias=True)

    def scores(hidden, weight, bias):
        return _LinearScores.apply(hidden, weight, bias, targets, 0.8, 3, True, False)

    assert torch.autograd.gradcheck(scores, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_is_the_same_for_chunks_of_any_size(backend, monkeypatch):
    """With entropy or not two graphs forward and two backward, whatever the sizes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    logprobs._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    for tokens, chunk_size in ((11, 4), (13, 5), (30, 30)):
        for used in ([0], [0, 1]):
            torch.manual_seed(tokens)
            hidden = torch.randn(tokens, H, requires_grad=True)
            head, targets = nn.Linear(H, V), torch.randint(0, V, (tokens,))
            upstream = torch.randn(2, tokens)
            inputs, scores = [hidden, *head.parameters()], []
            for compiled in (True, False):
                found = selected_log_probs(
                    hidden,
                    head,
                    targets,
                    temperature=0.6,
                    chunk_size=chunk_size,
                    entropy=1 in used,
                    compiled=compiled,
                )
                loss = sum((found[i] * upstream[i]).sum() for i in used)
                scores.append([*(found[i] for i in used), *torch.autograd.grad(loss, inputs)])
            for a, b in zip(*scores, strict=True):
                torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)
    logprobs._compiled.cache_clear()
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("entropy", [False, True])
def test_each_output_alone_carries_its_gradient(entropy):
    hidden, head, targets = make()
    log_probs, entropies = selected_log_probs(hidden, head, targets, chunk_size=4, entropy=entropy)
    expected = textbook(hidden, head, targets, 1.0)
    used, wanted = (entropies, expected[1]) if entropy else (log_probs, expected[0])
    grads = torch.autograd.grad(used.sum(), [hidden, head.weight])
    for grad, expected_grad in zip(grads, torch.autograd.grad(wanted.sum(), [hidden, head.weight]), strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


def test_entropy_costs_nothing_unless_asked():
    hidden, head, targets = make()
    assert selected_log_probs(hidden, head, targets)[1] is None


@pytest.mark.parametrize("wrap", [False, True])
def test_tied_embeddings_get_both_gradients(wrap):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(V, H, dtype=torch.float64), nn.Linear(H, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    tokens = torch.randint(0, V, (T,))
    log_probs, _ = selected_log_probs(embedding(tokens), Wrapped(head) if wrap else head, tokens, chunk_size=3)
    log_probs.sum().backward()
    got, embedding.weight.grad = embedding.weight.grad, None
    textbook(embedding(tokens), head, tokens, 1.0)[0].sum().backward()
    torch.testing.assert_close(got, embedding.weight.grad, atol=1e-12, rtol=0)


def test_a_frozen_head_passes_the_gradient_on():
    hidden, head, targets = make()
    head.requires_grad_(False)
    selected_log_probs(hidden, head, targets, chunk_size=4)[0].sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_logits_of_the_whole_batch_never_exist(wrap, entropy):
    """Neither forward nor backward creates a tensor with more rows of the vocabulary than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, chunk_size = 40, 8
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                    largest.append(tensor.shape[0])
            return out

    hidden, head = torch.randn(tokens, H, requires_grad=True), nn.Linear(H, V)
    with Watch():
        found = selected_log_probs(
            hidden,
            Wrapped(head) if wrap else head,
            torch.zeros(tokens, dtype=torch.int64),
            chunk_size=chunk_size,
            entropy=entropy,
        )
        sum(x.sum() for x in found if x is not None).backward()
    assert max(largest) == chunk_size


def test_bfloat16_hidden_states_give_float32_scores():
    hidden, head, targets = make(dtype=torch.bfloat16)
    log_probs, _ = selected_log_probs(hidden, head, targets, chunk_size=4)
    assert log_probs.dtype == torch.float32
    wide = nn.Linear(H, V, bias=False, dtype=torch.float64)
    wide.weight.data = head.weight.data.double()
    expected = textbook(hidden.double(), wide, targets, 1.0)[0]
    torch.testing.assert_close(log_probs.double(), expected, atol=0.02, rtol=0)
    log_probs.sum().backward()
    assert head.weight.grad.dtype == torch.bfloat16


def test_from_logits_by_hand():
    # four equal logits: log 1/4 and entropy log 4; probabilities 1/4 and 3/4: entropy 0.5623351
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0986123, -100.0, -100.0]])
    log_probs, entropy = log_probs_from_logits(logits, torch.tensor([2, 1]), entropy=True)
    assert log_probs.tolist() == pytest.approx([-1.3862944, -0.2876821])
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([1.3862944, 0.5623351])


def test_alignment_by_hand():
    tokens, positions = torch.tensor([7, 8, 9, 4, 5]), torch.tensor([0, 1, 2, 0, 1])
    assert next_tokens(tokens)[[0, 1, 3]].tolist() == [8, 9, 5]
    predicted = torch.tensor([-1.0, -2.0, -3.0, -4.0, float("nan")])
    assert align_with_tokens(predicted, positions).tolist() == [0, -1, -2, 0, -4]


def test_void_rows_have_no_gradient():
    values = torch.tensor([1.0, 2.0, torch.inf], requires_grad=True)
    align_with_tokens(values, torch.tensor([0, 1, 0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 0, 0]
