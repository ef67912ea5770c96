"""Parked tensors give up their memory and come back bit for bit."""

import pytest
import torch

from miles.builtins.parking import Parking


def test_values_come_back_across_pages():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for shape in ((7, 3), (1,), (40,), (2, 2))]
    tensors.append(torch.arange(9, dtype=torch.int16))
    expected = [t.clone() for t in tensors]
    parking = Parking(page_bytes=64)
    for _ in range(2):
        parking.park(tensors)
        assert [t.untyped_storage().nbytes() for t in tensors] == [0] * 5
        parking.bring_back()
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))
        tensors[0].mul_(2)
        expected[0].mul_(2)
    assert len(parking._pages) == -(-(4 * (21 + 1 + 40 + 4) + 2 * 9) // 64)


def test_what_shares_memory_goes_on_sharing_it():
    whole = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(whole[1])
    parking = Parking()
    parking.park([whole, parameter, torch.empty(0)])
    parking.bring_back()
    whole[1, 2] = -1
    assert parameter.tolist() == [4, 5, -1, 7]


def test_one_place_holds_one_thing():
    parking = Parking(page_bytes=8)
    parking.bring_back()
    parking.park([torch.ones(1)])
    with pytest.raises(RuntimeError, match="bring it back first"):
        parking.park([torch.ones(1)])
