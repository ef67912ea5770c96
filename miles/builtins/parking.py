"""Tensors that step aside: their values wait in the machine's memory while somebody else uses the accelerator's.

Pinned memory, which the accelerator reads and writes by itself, is several times faster than ordinary memory, but slow
to get, and torch hands it out in powers of two. So it is taken once, in pages of one size, and kept for the next time;
a tensor is cut where a page ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

PAGE_BYTES = 256 * 2**20


class Parking:
    """A place for the storages of some tensors. The tensors stay the objects they are, views of one another included,
    but must not be used until they are back."""

    def __init__(self, page_bytes: int = PAGE_BYTES):
        self.page_bytes = page_bytes
        self._pages: list[Tensor] = []
        self._parked: list[tuple[UntypedStorage, torch.device, int]] = []
        """Storages, where they belong, and how many bytes they had, in the order they lie in the pages."""

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Copy what these hold, and give up their memory. A storage that several of them share is parked once."""
        if self._parked:
            raise RuntimeError("something is parked already; bring it back first")
        found = {t.untyped_storage().data_ptr(): (t.untyped_storage(), t.device) for t in tensors if t.numel()}
        self._parked = [(storage, device, storage.nbytes()) for storage, device in found.values()]
        for piece, place in self._pieces():
            place.copy_(piece, non_blocking=True)
        _wait({device for _, device, _ in self._parked})
        for storage, _, _ in self._parked:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Give the tensors memory again, with what they held. Nothing to do when nothing is parked."""
        for storage, _, nbytes in self._parked:
            storage.resize_(nbytes)
        for piece, place in self._pieces():
            piece.copy_(place, non_blocking=True)
        self._parked = []

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes of a storage, their place in a page), in order."""
        position = 0
        for storage, device, nbytes in self._parked:
            content = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            done = 0
            while done < nbytes:
                page, offset = divmod(position, self.page_bytes)
                count = min(nbytes - done, self.page_bytes - offset)
                yield content[done : done + count], self._page(page, device)[offset : offset + count]
                done += count
                position += count

    def _page(self, index: int, device: torch.device) -> Tensor:
        if index == len(self._pages):
            pinned = device.type == "cuda"
            self._pages.append(torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=pinned))
        return self._pages[index]


def _wait(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
