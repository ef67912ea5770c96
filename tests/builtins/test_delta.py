"""Differences of bytes: by hand, and undone exactly."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.builtins.delta import apply, best_checksum, best_compression, bytes_of, checksum, codec, encode
from miles.errors import ConfigError, WeightSyncError

OLD = np.array([1, 2, 3, 255, 0], np.uint8)
NEW = np.array([1, 6, 3, 0, 0], np.uint8)


def test_xor_by_hand():
    assert encode(NEW, OLD, "xor") == (bytes([0, 2 ^ 6, 0, 255, 0]), 2)


def test_overwrite_by_hand():
    """Two of them, bytes 1 and 3, which become 6 and 0."""
    assert encode(NEW, OLD, "overwrite") == (bytes([2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 6, 0]), 2)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@given(pairs=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255))))
def test_what_is_encoded_is_applied(encoding, pairs):
    old, new = (np.array([pair[i] for pair in pairs], np.uint8) for i in (0, 1))
    difference, changed = encode(new, old, encoding)
    assert apply(old, difference, encoding).tolist() == new.tolist()
    assert changed == sum(a != b for a, b in pairs)


def test_overwriting_twice_is_overwriting_once():
    difference, _ = encode(NEW, OLD, "overwrite")
    assert apply(NEW, difference, "overwrite").tolist() == NEW.tolist()


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_difference_of_another_tensor_is_refused(encoding):
    difference, _ = encode(NEW, OLD, encoding)
    with pytest.raises(WeightSyncError, match="it has 2 bytes here"):
        apply(OLD[:2], difference, encoding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_bytes_of_any_tensor(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    again = torch.from_numpy(bytes_of(tensor.T).copy()).view(dtype).view(3, 2)
    assert torch.equal(again, tensor.T)


@pytest.mark.parametrize("name", ["zlib", "none", "zstd"])
def test_compression_is_undone(name):
    if name == "zstd" and best_compression() != "zstd":
        pytest.skip("zstd is not installed")
    data = bytes(1000) + b"something" + bytes(1000)
    packed = codec(name).compress(data)
    assert codec(name).decompress(packed) == data
    assert (len(packed) < 100) == (name != "none")


def test_zstd_that_is_not_installed(monkeypatch):
    for module in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    assert best_compression() == "zlib"
    with pytest.raises(ConfigError, match=r"zstd, which is not installed: pip install 'miles\[delta\]', or"):
        codec("zstd")


def test_checksums(monkeypatch):
    """`printf abc | b2sum -l 128`, and the vector of xxHash's own tests for an empty input."""
    abc = np.frombuffer(b"abc", np.uint8)
    assert checksum(abc, "blake2b") == "cf4ab791c62b8d2b2109c90275287816"
    if best_checksum() == "xxh3-128":
        assert checksum(abc[:0], "xxh3-128") == "99aa06d3014798d86001c324468d497f"
    monkeypatch.setitem(sys.modules, "xxhash", None)
    assert best_checksum() == "blake2b"
    with pytest.raises(WeightSyncError, match="'xxh3-128' cannot be computed here"):
        checksum(abc, "xxh3-128")
