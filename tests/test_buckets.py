"""Weights as runs of bytes and back: bit for bit, groups whole, and never more bytes than asked for."""

import pytest
import torch

from miles.buckets import pack, places, unpack
from miles.testing.tiny import merged

GROUPS = [
    {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.bfloat16)},
    {"c": torch.tensor(2.5), "none": torch.zeros(0, 4)},
    {"d": torch.randn(4, 6, dtype=torch.float64).T},
    {"e": torch.tensor([True, False]), "f": torch.tensor([1, 2], dtype=torch.int8)},
]


def sent(groups, limit):
    """As a receiver sees it: each bucket's bytes copied before the next but one is made."""
    for bucket in pack(groups, limit):
        yield bucket.bytes.clone(), bucket.groups


@pytest.mark.parametrize("limit", [1, 100, 150, 10_000])
def test_what_is_packed_is_unpacked(limit):
    buckets = list(sent(GROUPS, limit))
    found = [group for run, entries in buckets for group in unpack(run, entries)]
    assert [list(group) for group in found] == [list(group) for group in GROUPS]
    there, wanted = merged(found), merged(GROUPS)
    assert all(there[n].dtype == t.dtype and torch.equal(there[n], t) for n, t in wanted.items())


# Each tensor is padded to 16 bytes: 60 + 14 -> 64 + 16; 4 + 0 -> 16; 192; 2 + 2 -> 16 + 16.
@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1, [80, 16, 192, 32]), (96, [96, 192, 32]), (100, [96, 192, 32]), (224, [96, 224]), (320, [320])],
)
def test_a_bucket_is_as_full_as_it_may_be(limit, sizes):
    assert [len(run) for run, _ in sent(GROUPS, limit)] == sizes


def test_where_tensors_are():
    (bucket,) = pack([{"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2)}, {"c": torch.ones(1)}], 1000)
    found = [[(entry.name, place.start, place.stop) for entry, place in group] for group in places(bucket.groups)]
    assert found == [[("a", 0, 3), ("b", 16, 24)], [("c", 32, 36)]]


def test_a_bucket_lasts_while_the_next_is_made():
    """It is on its way then."""
    buckets = pack(({str(i): torch.full((4,), float(i))} for i in range(5)), 16)
    last = next(buckets)
    for i, bucket in enumerate(buckets):
        assert last.bytes.view(torch.float32).tolist() == [i] * 4
        last = bucket
    assert last.bytes.view(torch.float32).tolist() == [4] * 4


def test_a_bucket_can_be_elsewhere_than_the_weights():
    (bucket,) = pack([{"a": torch.ones(3)}], 100, "meta")
    assert (bucket.bytes.device.type, len(bucket.bytes)) == ("meta", 16)


def test_two_runs_of_memory_take_turns():
    """However many buckets there are."""
    places = {bucket.bytes.data_ptr() for bucket in pack(({str(i): torch.ones(4)} for i in range(9)), 16)}
    assert len(places) == 2
