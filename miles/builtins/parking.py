"""Tensors that step aside: their values wait in the machine's memory while somebody else uses the accelerator's.

Pinned memory, which the accelerator reads and writes by itself, is several times faster than ordinary memory, but slow
to get, and torch hands it out in powers of two. So it is taken once, in pages of one size, and kept for the next who
parks something in this process: whoever takes turns shares them. A tensor is cut where a page ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

PAGE_BYTES = 256 * 2**20


class Pages:
    """Pages of a process that nothing is parked in, and those that are taken."""

    def __init__(self, page_bytes: int = PAGE_BYTES):
        self.page_bytes = page_bytes
        self.count = 0
        """There are in all: the most that was ever parked at once, rounded up for each who parked."""
        self._free: list[Tensor] = []

    def take(self, device: torch.device) -> Tensor:
        """One that suits copies from and to a device."""
        pinned = device.type == "cuda"
        for index, page in enumerate(self._free):
            if page.is_pinned() == pinned:
                return self._free.pop(index)
        self.count += 1
        return torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=pinned)

    def give_back(self, pages: Iterable[Tensor]) -> None:
        self._free += pages


PROCESS = Pages()
"""What everything in a process shares."""


class Parking:
    """A place for the storages of some tensors. The tensors stay the objects they are, views of one another included,
    but must not be used until they are back."""

    def __init__(self, pages: Pages = PROCESS):
        self.pages = pages
        self._taken: list[Tensor] = []
        self._parked: list[tuple[UntypedStorage, torch.device, int]] = []
        """Storages, where they belong, and how many bytes they had, in the order they lie in the pages."""

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Copy what these hold, and give up their memory. A storage that several of them share is parked once, and
        whole, also where they are parts of it."""
        if self._parked:
            raise RuntimeError("something is parked already; bring it back first")
        storages = {t.untyped_storage().data_ptr(): (t.untyped_storage(), t.device) for t in tensors}
        self._parked = [
            (storage, device, storage.nbytes()) for storage, device in storages.values() if storage.nbytes()
        ]
        for piece, place in self._pieces():
            place.copy_(piece, non_blocking=True)
        self._wait()
        for storage, _, _ in self._parked:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Give the tensors memory again, with what they held. Nothing to do when nothing is parked."""
        for storage, _, nbytes in self._parked:
            storage.resize_(nbytes)
        for piece, place in self._pieces():
            piece.copy_(place, non_blocking=True)
        self._wait()  # the pages may be somebody else's in a moment
        self.pages.give_back(self._taken)
        self._taken, self._parked = [], []

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes of a storage, their place in a page), in order."""
        position = 0
        for storage, device, nbytes in self._parked:
            content = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            done = 0
            while done < nbytes:
                page, offset = divmod(position, self.pages.page_bytes)
                if page == len(self._taken):
                    self._taken.append(self.pages.take(device))
                count = min(nbytes - done, self.pages.page_bytes - offset)
                yield content[done : done + count], self._taken[page][offset : offset + count]
                done += count
                position += count

    def _wait(self) -> None:
        for device in {device for _, device, _ in self._parked if device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
