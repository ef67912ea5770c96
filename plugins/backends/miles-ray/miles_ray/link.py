"""One worker from the driver's end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miles.toolkit import Failure, WorkerFailure
from miles_ray.actor import News, Place, Surroundings, rest_of
from miles_ray.parcel import Outbox, Parcel

logger = logging.getLogger("miles")
GRACE = 5.0
"""Seconds that calls under way have to end, when the group is closed."""
REACH = 5.0
"""Seconds for a machine to hand over the rest of a log, and for a killed process to be gone."""
TAIL = 20
"""Lines of the log of a worker that died."""


class RayLink:
    """The link to one actor.

    Args:
        name: of the group.
        node: id of the actor's node, as Ray calls it.
        log: where the driver wants to have what the worker writes; None to leave it to Ray.
    """

    def __init__(self, name: str, rank: int, actor: Any, node: str, outbox: Outbox, log: Path | None):
        self.name, self.rank, self.actor, self.node, self.outbox, self.log = name, rank, actor, node, outbox, log
        self.place: Place | None = None
        self._order, self._turns = asyncio.Lock(), itertools.count()
        self._listening: asyncio.Future | None = None
        self._fetching: asyncio.Future | None = None
        self._stopping: asyncio.Future | None = None
        self._received, self._killed = 0, False
        self._log_start = log.stat().st_size if log is not None and log.exists() else 0

    async def enter(self, around: Surroundings) -> Place:
        """Start the actor.

        Raises:
            WorkerFailure: it cannot be started.
        """
        self.place = await self._outcome(self.actor.enter.remote(self.name, around))
        self._listening = asyncio.ensure_future(self._listen())
        return self.place

    async def request(self, method: str, *args: Any) -> Any:
        async with self._order:
            parcel = await self.outbox.send(method, *args)
            turn = next(self._turns)
            answer = self.actor.request.remote(turn, parcel)
        try:
            reply: Parcel = await self._outcome(answer)
        except asyncio.CancelledError:
            if not self._killed:
                self.actor.abandon.remote(turn)
            raise
        succeeded, value = await reply.open()
        if not succeeded:
            raise WorkerFailure(value)
        return value

    async def stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        with suppress(WorkerFailure, TimeoutError):
            await asyncio.wait_for(self.request("drop", ""), GRACE)
            self._pass_on(await asyncio.wait_for(self._outcome(self.actor.news.remote(wait=False)), GRACE))
        self.kill()
        await self._fetch_log()

    def kill(self) -> None:
        self._killed = True
        ray.kill(self.actor)

    async def _outcome(self, answer: Any) -> Any:
        try:
            return await answer
        except RayActorError as error:
            how = "ended by the driver" if self._killed else _reason(error)
            raise WorkerFailure(Failure(self.rank, "died", await self._last_lines() + how)) from None
        except RayError as error:
            raise WorkerFailure(Failure(self.rank, "raised", str(error))) from None

    # --------------------------------------------------------------------------------------------------------- output

    async def _listen(self) -> None:
        """Pass on what the worker says by itself, until it has ended."""
        with suppress(RayError):
            while True:
                self._pass_on(await self.actor.news.remote())

    def _pass_on(self, news: News) -> None:
        for level, message in news.messages:
            logger.log(level, "[%s %d] %s", self.name, self.rank, message)
        self._write(news.output)

    def _write(self, output: bytes) -> None:
        if output and self.log is not None:
            self._received += len(output)
            with self.log.open("ab") as file:
                file.write(output)

    async def _last_lines(self) -> str:
        """Of the log of a worker that is gone, with a heading; empty without any."""
        if self.log is None:
            return ""
        await self._fetch_log()
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - 16384))
            lines = file.read().decode(errors="replace").splitlines()[-TAIL:]
        return "\n".join([f"last lines of {self.log}:", *(f"    {line}" for line in lines), ""])

    async def _fetch_log(self) -> None:
        """Once the worker is gone, the rest of a log that the driver does not see, if its machine answers."""
        if self._fetching is None:
            self._fetching = asyncio.ensure_future(self._fetch())
        await asyncio.shield(self._fetching)

    async def _fetch(self) -> None:
        if self.place is None or self._listening is None:
            return
        await asyncio.wait([self._listening], timeout=REACH)
        self._listening.cancel()
        if self.place.log is None or self.place.shared_log:
            return
        where = NodeAffinitySchedulingStrategy(self.node, soft=False)
        rest = ray.remote(rest_of).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        with suppress(RayError, TimeoutError):
            self._write(await asyncio.wait_for(rest.remote(self.place.log, self._received), REACH))


def _reason(error: RayActorError) -> str:
    """What Ray says of an actor's end, on one line; without the names of the actor, where it tells more than those."""
    text = " ".join(str(error).split())
    return text.partition("Worker exit detail: ")[2] or text
