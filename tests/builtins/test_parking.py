"""Parked tensors give up their memory and come back bit for bit."""

import pytest
import torch

from miles.builtins.parking import Pages, Parking


def test_values_come_back_across_pages():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for shape in ((7, 3), (1,), (40,), (2, 2))]
    tensors.append(torch.arange(9, dtype=torch.int16))
    expected = [t.clone() for t in tensors]
    parking = Parking(Pages(page_bytes=64))
    for _ in range(2):
        parking.park(tensors)
        assert [t.untyped_storage().nbytes() for t in tensors] == [0] * 5
        parking.bring_back()
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))
        tensors[0].mul_(2)
        expected[0].mul_(2)
    assert parking.pages.count == -(-(4 * (21 + 1 + 40 + 4) + 2 * 9) // 64)


def test_what_shares_memory_goes_on_sharing_it():
    whole = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(whole[1])
    parking = Parking()
    parking.park([whole, parameter, torch.empty(0)])
    parking.bring_back()
    whole[1, 2] = -1
    assert parameter.tolist() == [4, 5, -1, 7]


def test_one_place_holds_one_thing():
    parking = Parking(Pages(page_bytes=8))
    parking.bring_back()
    parking.park([torch.ones(1)])
    with pytest.raises(RuntimeError, match="bring it back first"):
        parking.park([torch.ones(1)])


def test_who_takes_turns_shares_the_pages():
    pages = Pages(page_bytes=16)
    first, second = Parking(pages), Parking(pages)
    one, two = torch.arange(10.0), torch.arange(12.0)
    for _ in range(3):
        first.park([one])
        first.bring_back()
        second.park([two])
        second.bring_back()
    assert pages.count == 3  # 48 bytes
    first.park([one])
    second.park([two])
    first.bring_back()
    second.bring_back()
    assert pages.count == 6
    assert torch.equal(one, torch.arange(10.0))
    assert torch.equal(two, torch.arange(12.0))


def test_a_view_of_nothing_takes_its_storage_along():
    """What FSDP2 keeps for a rank that holds no row of a parameter: padding."""
    padding = torch.zeros(4)
    parking = Parking(Pages(page_bytes=16))
    parking.park([padding[:0]])
    assert padding.untyped_storage().nbytes() == 0
    parking.bring_back()
    assert padding.tolist() == [0.0] * 4
