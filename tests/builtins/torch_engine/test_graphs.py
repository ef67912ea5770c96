"""Sizes for which a decoding step is recorded. What the graphs compute is checked by scripts/gpu/torch_engine.py."""

from __future__ import annotations

import pytest

from miles.builtins.torch_engine.graphs import batch_bucket, length_bucket


@pytest.mark.parametrize(
    ("count", "bucket"), [(1, 1), (3, 4), (5, 6), (6, 6), (7, 8), (9, 12), (13, 16), (100, 128), (90, 96), (190, 190)]
)
def test_batches_are_padded_by_at_most_half(count, bucket):
    assert batch_bucket(count, capacity=190) == bucket


@pytest.mark.parametrize(("keys", "bucket"), [(1, 512), (512, 512), (513, 1000), (600, 1000)])
def test_lengths_double(keys, bucket):
    assert length_bucket(keys, longest=1000) == bucket
    assert length_bucket(keys, longest=100) == 100
