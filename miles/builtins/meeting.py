"""Processes that meet for one push of weights: a store in the driver for words, a process group for bytes.

The group is none of `torch.distributed`'s default ones: its members are the first train rank and the engines, which
belong to no group together. It is formed at the first push and kept for the next; whoever saw a push fail forgets it,
and where anybody has none, all form a new one. Nobody waits at the group for somebody who is not coming: members first
say in the store that they are there, and whoever fails says that too. Once it has begun, the sender alone ends it: a
receiver that left on its own would keep a sender waiting who does not know it yet.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from miles.api import WeightSyncError
from miles.builtins.sync_partners import AbandonedError

FAILED, ENDED = "failed", "ended"
"""What anybody says who fails, and what the sender says (or the driver, if the sender died)."""
_kept: dict[str, tuple[str, Any]] = {}
"""Of this process, by sync: the name of its group, and the group."""


@dataclass(frozen=True)
class Meeting:
    """Data: it crosses to every member."""

    host: str
    port: int
    """Of the driver's store."""
    sync: str
    """Which meetings have one group after another."""
    members: str
    """Who they are: a group is kept as long as this stays the same."""
    push: str
    """This push, among all that use the store."""
    size: int
    """Members; rank 0 sends."""
    timeout: float
    """Seconds."""


class Member:
    """One of them, in its own process."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank = meeting, rank
        patience = timedelta(seconds=meeting.timeout)
        self.tcp = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=patience, wait_for_workers=False)
        self.store = dist.PrefixStore(meeting.push, self.tcp)
        self.group: Any = None
        self.heeds = [FAILED, ENDED]

    # ----------------------------------------------------------------------------------------------------------- words

    def say(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """What somebody says; waits until it is said.

        Raises:
            AbandonedError: somebody failed.
            WeightSyncError: nobody said it in time.
        """
        deadline, pause = time.monotonic() + self.meeting.timeout, 0.0002
        while not self.store.check([key]):
            self.heed()
            if time.monotonic() > deadline:
                raise WeightSyncError(f"no {key!r} in {self.meeting.timeout:g} s: somebody does not answer")
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return json.loads(self.store.get(key))

    def heed(self) -> None:
        """Raises AbandonedError when somebody has failed."""
        for key in self.heeds:
            if self.store.check([key]):
                raise AbandonedError(f"given up, because of {json.loads(self.store.get(key))}")

    def fail(self, error: BaseException) -> None:
        """Tell everybody."""
        self.forget()
        with suppress(RuntimeError):  # the driver that holds the store may be gone
            self.say(FAILED if self.rank else ENDED, f"{type(error).__name__}: {error}")

    def forget(self) -> None:
        """Let another group be formed next time."""
        _drop(self.meeting.sync)

    # ----------------------------------------------------------------------------------------------------------- bytes

    def join(self, device: torch.device | None = None) -> None:
        """Wait for all, then form the group or take the one that all have kept. The sender says on which device."""
        meeting = self.meeting
        name, group = _kept.get(meeting.sync, ("", None))
        if self.rank == 0:
            assert device is not None
            names = {self.hear(f"here/{rank}") for rank in range(1, meeting.size)} | {name}
            kind = f"{device.type}/{meeting.members}/"
            self.say("start", name if names == {name} and name.startswith(kind) else kind + meeting.push)
        else:
            self.say(f"here/{self.rank}", name)
        agreed = self.hear("start")
        if self.rank:
            self.heeds = [ENDED]
        if agreed != name:
            self.forget()
            group = _form(agreed, dist.PrefixStore(agreed, self.tcp), self.rank, meeting)
            _kept[meeting.sync] = agreed, group
        self.group = group
        self.device = torch.device(agreed.partition("/")[0])

    def broadcast(self, run: Tensor) -> Any:
        """Rank 0's bytes into everybody's; the result's `wait()` returns when they may be used again."""
        return self.group.broadcast(run, 0)


def _drop(sync: str) -> None:
    name, group = _kept.pop(sync, ("", None))
    if name.startswith("cuda"):  # it would wait for whoever left; gloo's sockets close by themselves
        group.abort()


@atexit.register
def _drop_all() -> None:
    """While the threads of groups can still be joined."""
    for sync in [*_kept]:
        _drop(sync)


def _form(name: str, store: Any, rank: int, meeting: Meeting) -> Any:
    patience = timedelta(seconds=meeting.timeout)
    if not name.startswith("cuda"):
        return dist.ProcessGroupGloo(store, rank, meeting.size, patience)
    # One sender's stream to a few receivers gains nothing from NVLink multicast, which many machines forbid.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = patience
    return dist.ProcessGroupNCCL(store, rank, meeting.size, options)
