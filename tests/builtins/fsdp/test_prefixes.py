"""A prompt that siblings share is computed once, and nothing comes out differently."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.api import LossResult
from miles.builtins.fsdp.attention import PackedLayout, flex_packed, sdpa_packed
from miles.builtins.fsdp.prefixes import TokenTree
from miles.training.packing import build_micro_batch, split_micro_batch

MODULE = SimpleNamespace(is_causal=True)


def make_batch(groups, seed=0):
    """`groups`: (prompt length, response lengths) of each; a mask of 1 on responses."""
    draw = np.random.default_rng(seed)
    samples, masks = [], []
    for prompt_len, responses in groups:
        prompt = draw.integers(0, 37, prompt_len)
        for length in responses:
            samples.append(np.concatenate([prompt, draw.integers(0, 37, length)]))
            masks.append(np.r_[np.zeros(prompt_len), np.ones(length)].astype(np.float32))
    weights = [np.linspace(0.5, 1.5, len(s), dtype=np.float32) * m for s, m in zip(samples, masks, strict=True)]
    return build_micro_batch(list(range(len(samples))), samples, {"mask": masks, "weights": weights})


GROUPS = [(6, [3, 5, 1, 5]), (4, [2]), (6, [4, 4, 9]), (1, [7, 2])]


def test_what_is_shared():
    batch = make_batch(GROUPS)
    assert batch.shared == [0, 6, 6, 6, 0, 0, 6, 6, 0, 1]
    first, second = split_micro_batch(batch)
    assert first.shared + second.shared == [0, 6, 6, 6, 0, 0, 6, 6, 0, 1]
    shorter = build_micro_batch([0, 1], [[7, 8, 1], [7, 8, 2]], {"mask": [torch.tensor([0, 0, 1])] * 2})
    assert shorter.shared == [0, 2]
    unmasked = build_micro_batch([0, 1], [[1, 2, 3]] * 2, {"mask": [np.zeros(3)] * 2})
    assert unmasked.shared == [0, 0]
    assert build_micro_batch([0, 1], [[1, 2, 3]] * 2, {}).shared == []
    images = build_micro_batch([0, 1], [[1, 2]] * 2, {"mask": [np.r_[0, 1]] * 2}, multimodal=[{"pixels": 1}, {}])
    assert images.shared == []


def test_a_tree_worked_out_by_hand():
    """Samples `abcX`, `abcYZ`: five own tokens and a prompt of three."""
    tree = TokenTree.of([0, 4, 9], [0, 3], "cpu")
    assert [(s.start, s.length, s.context and s.context.start) for s in tree.stretches] == [
        (0, 3, None),
        (3, 1, 0),
        (4, 2, 0),
    ]
    assert tree.token_U.tolist() == [0, 1, 2, 3, 7, 8]
    assert tree.place_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5]
    assert tree.before_U.tolist() == [0, 0, 1, 2, 2, 4]


def test_little_in_common_is_left_alone():
    assert TokenTree.of([0, 20, 40], [0, 3], "cpu").token_U is None  # 3 of 40 tokens
    assert TokenTree.of([0, 20, 40], [0, 4], "cpu").token_U is not None


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=5)
)
def test_every_token_is_computed_where_it_is_looked_for(groups):
    batch = make_batch(groups)
    tree = TokenTree.of(batch.bounds, batch.shared, "cpu")
    tokens_U, positions_U = tree.computed(batch.tokens_T), tree.computed(batch.positions_T)
    assert torch.equal(tree.spread(tokens_U), batch.tokens_T)
    assert torch.equal(tree.spread(positions_U), batch.positions_T)
    predecessors_T = tree.spread(tree.predecessors(tokens_U))
    later_T = batch.positions_T > 0
    assert torch.equal(predecessors_T[later_T], batch.tokens_T.roll(1)[later_T])
    assert len(tokens_U) == sum(stretch.length for stretch in tree.stretches)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3, 8, 100])
@pytest.mark.parametrize("kernel", [sdpa_packed, flex_packed])
def test_attention_sees_the_prompt_and_no_sibling(kernel, window):
    batch = make_batch(GROUPS)
    layout = PackedLayout(batch.bounds, "cpu", batch.shared)
    torch.manual_seed(0)
    count = len(layout.tree.token_U)
    inputs = [torch.randn(1, heads, count, 8, requires_grad=kernel is sdpa_packed) for heads in (4, 2, 2)]
    out, _ = kernel(MODULE, *inputs, None, packed=layout, scaling=0.3, sliding_window=window)
    whole = PackedLayout(batch.bounds, "cpu")
    spread = [layout.tree.spread(x[0].transpose(0, 1)).transpose(0, 1)[None] for x in inputs]
    expected, _ = sdpa_packed(MODULE, *spread, None, packed=whole, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(layout.tree.spread(out[0]), expected[0], atol=1e-5, rtol=0)
    if kernel is sdpa_packed:
        upstream = torch.randn_like(expected[0])
        found = torch.autograd.grad((layout.tree.spread(out[0]) * upstream).sum(), inputs)
        wanted = torch.autograd.grad((expected[0] * upstream).sum(), inputs)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_says_and_learns_the_same(make_backend, gradients, role, checkpointing):
    batch = make_batch(GROUPS)
    backend = make_backend(role=role, train={"gradient_checkpointing": checkpointing}, temperature=0.7)
    assert backend.shares_prompts
    want = frozenset({"log_probs", "entropy", "logits"} if role == "actor" else {"values"})

    def loss(batch, outputs):
        spoken = outputs.values_T if role == "critic" else outputs.log_probs_T + 0.1 * outputs.entropy_T
        total = (spoken * batch.columns["weights"]).sum()
        if role == "actor":
            for start, end in pairwise(batch.bounds):
                total = total + outputs.logits(start + 1, end).square().mean()
        return LossResult(total, {"loss": total.detach()})

    found = []
    for shares in (True, False):
        backend.shares_prompts = shares
        backend.zero_grad()
        sums = backend.forward_backward([batch], loss, want)
        (outputs,) = backend.forward([batch], want - {"logits"})
        found.append((sums, gradients(backend), outputs))
    (shared_sums, shared_grads, shared), (sums, grads, whole) = found
    torch.testing.assert_close(shared_sums, sums, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(shared_grads, grads, atol=2e-5, rtol=1e-4)
    for name in want - {"logits"}:
        torch.testing.assert_close(getattr(shared, f"{name}_T"), getattr(whole, f"{name}_T"), atol=1e-5, rtol=0)


def test_a_model_computes_a_shared_prompt_once(make_backend):
    batch = make_batch([(20, [2] * 8)])
    backend, seen = make_backend(), []
    backend.scorer.lm.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    backend.forward([batch], frozenset({"log_probs"}))
    assert seen == [20 + 8 * 2]
    assert batch.bounds == list(accumulate([22] * 8, initial=0))


def test_a_balance_loss_counts_every_token(make_backend, moe):
    assert not make_backend(moe(output_router_logits=True)).shares_prompts
