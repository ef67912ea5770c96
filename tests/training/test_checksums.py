"""Digests of tensors: of all their bits, in their order."""

import numpy as np
import torch

from miles.training import checksums as module
from miles.training.checksums import checksums, digest

MASK = 2**64 - 1


def by_hand(data):
    """The same sum in Python's own integers."""
    data += bytes(-len(data) % 8)
    total = 0
    for place, word in enumerate(np.frombuffer(data, "<u8").tolist(), 1):
        word ^= place * 0x9E3779B97F4A7C15 & MASK
        word = word * 0xBF58476D1CE4E5B9 & MASK
        word ^= arithmetic_shift(word, 29)
        word = word * 0x94D049BB133111EB & MASK
        word ^= arithmetic_shift(word, 32)
        total += word
    return total & MASK


def arithmetic_shift(word, by):
    """Of signed words, which torch has: the sign fills up from the left."""
    return ((word - (word >> 63 << 64)) >> by) & MASK


def test_a_digest_by_hand():
    for tensor in (torch.randn(5, 3), torch.randn(7).bfloat16(), torch.tensor(True), torch.zeros(0)):
        assert digest(tensor) == by_hand(tensor.flatten().view(torch.uint8).numpy().tobytes())


def test_it_does_not_depend_on_where_the_bits_lie(monkeypatch):
    """A view with an odd offset, a transposed tensor, and chunks of any size."""
    tensor = torch.randn(33, 9).bfloat16()
    shifted = torch.cat([torch.ones(3).bfloat16(), tensor.flatten()])[3:].view(33, 9)
    whole = digest(tensor)
    assert digest(shifted) == digest(tensor.T.contiguous().T) == whole
    monkeypatch.setattr(module, "CHUNK", 64)
    assert digest(tensor) == whole


def test_every_bit_and_every_place_counts():
    tensor = torch.randn(64)
    found = {digest(tensor)}
    for i in range(64):
        other = tensor.clone()
        other.view(torch.int32)[i] ^= 1 << (i % 31)
        found.add(digest(other))
    assert len(found) == 65
    swapped = tensor.clone()
    swapped[[0, 2]] = tensor[[2, 0]]
    assert digest(swapped) not in found
    assert digest(torch.cat([tensor[2:], tensor[:2]])) not in found


def test_names_and_dtypes():
    found = checksums([{"a": torch.ones(2), "b": torch.ones(2).bfloat16()}, {"c": torch.ones(2)}])
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == found["c"] != found["b"]
    assert found["b"].startswith("torch.bfloat16 ")
