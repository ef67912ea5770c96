"""Each kernel over packed samples against plain softmax attention, one sample at a time."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.builtins.fsdp.attention import SIMILAR, PackedLayout, flex_packed, sdpa_packed
from miles.errors import ConfigError

HEADS, KEY_HEADS, SIZE = 4, 2, 8
MODULE = SimpleNamespace(is_causal=True)


def make(lengths):
    torch.manual_seed(0)
    bounds = [0, *accumulate(lengths)]
    shapes = ((HEADS, "query"), (KEY_HEADS, "key"), (KEY_HEADS, "value"))
    return bounds, {
        name: torch.randn(1, heads, bounds[-1], SIZE, dtype=torch.float64, requires_grad=True) for heads, name in shapes
    }


def textbook(bounds, inputs, scaling, window=None):
    """Softmax over each sample's own past, one sample after the other: `[1, T, A, D]`."""
    outs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[0, :, start:end] for x in inputs.values())
        k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in (k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = (distance >= 0) & (distance < (window or 10**6))
        scores = (q @ k.mT * scaling).masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)[None]


def check(kernel, lengths, window=None, scaling=0.3):
    bounds, inputs = make(lengths)
    layout = PackedLayout(bounds, "cpu")
    out, _ = kernel(MODULE, *inputs.values(), None, packed=layout, scaling=scaling, sliding_window=window)
    expected = textbook(bounds, inputs, scaling, window)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad((out * upstream).sum(), list(inputs.values()))
    for grad, wanted in zip(
        grads, torch.autograd.grad((expected * upstream).sum(), list(inputs.values())), strict=True
    ):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 9, 2, 8, 1], [10, 9, 8, 3], [1]])
def test_sdpa(lengths, window):
    check(sdpa_packed, lengths, window)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
def test_flex(window):
    """Uncompiled, in float32: what flex_attention can do on a CPU."""
    bounds, inputs = make([5, 2, 9])
    inputs = {name: x.detach().float() for name, x in inputs.items()}
    layout = PackedLayout(bounds, "cpu")
    out, _ = flex_packed(MODULE, *inputs.values(), None, packed=layout, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(out, textbook(bounds, inputs, 0.3, window), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- layouts


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_every_token_has_a_slot_of_its_own_and_padding_is_bounded(lengths):
    bounds = [0, *accumulate(lengths)]
    layout = PackedLayout(bounds, "cpu")
    slots = layout.slot_T if layout.slot_T is not None else torch.arange(bounds[-1])
    assert len(set(slots.tolist())) == bounds[-1]
    assert int(slots.max()) < layout.slots <= bounds[-1] / SIMILAR
    starts = {block.first + place * block.length for block in layout.blocks for place in range(block.count)}
    assert all(int(slots[start]) in starts for start in bounds[:-1])


def test_equal_lengths_are_left_in_place():
    layout = PackedLayout([0, 6, 12, 18], "cpu")
    assert [(block.first, block.count, block.length) for block in layout.blocks] == [(0, 3, 6)]
    assert layout.slot_T is None


@pytest.mark.parametrize("argument", ["softcap", "s_aux"])
def test_attention_of_another_form_is_refused(argument):
    bounds, inputs = make([3])
    with pytest.raises(ConfigError, match=argument):
        sdpa_packed(MODULE, *inputs.values(), None, packed=PackedLayout(bounds, "cpu"), **{argument: 1.0})


def test_attention_that_sees_the_future_is_refused():
    bounds, inputs = make([3])
    with pytest.raises(ConfigError, match="is_causal"):
        sdpa_packed(SimpleNamespace(is_causal=False), *inputs.values(), None, packed=PackedLayout(bounds, "cpu"))
