"""Engines that were lost while they generated: out of service at once, started again beside the others' work, back in
service when they have the weights.

As long as another engine is there, a lost one waits for the next weight sync. When none is left, the weights are sent
in the middle of the rollout. Until then its requests wait, or go elsewhere: none is lost, and no token is drawn from
weights that nobody knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from miles.errors import EngineError, EngineLostError, MilesError
from miles.log import logger
from miles.protocols import RolloutEngine


class Recovery:
    """Of the engines of a job, which it numbers from 0. Without `restart` and `resync`, a lost engine is an error."""

    def __init__(
        self,
        engines: Sequence[RolloutEngine],
        most: int = 0,
        restart: Callable[[Any], Awaitable[None]] | None = None,
        resync: Callable[[], Awaitable[None]] | None = None,
    ):
        """
        Args:
            most: restarts in the whole run; the next engine that is lost ends it.
            restart: starts an engine again, and puts it where the others are (asleep, or not).
            resync: sends every engine the trainer's weights, in the middle of a rollout.
        """
        self.engines, self.most, self.restart, self.resync = engines, most, restart, resync
        self.restarts = 0
        self.lives = [0] * len(engines)
        """How often each was lost: what is said of an earlier life is no news."""
        self._starting: dict[int, asyncio.Future[None]] = {}
        """Engines out of service, and their start, which may have ended."""
        self._turn = asyncio.Lock()
        self._hopeless: MilesError | None = None
        """Why no engine can be brought back, once that is known: nobody who waits need try again."""

    def serving(self) -> list[int]:
        """Engines that have weights and can be asked."""
        return [index for index in range(len(self.engines)) if index not in self._starting]

    def lose(self, index: int, life: int, error: EngineLostError) -> None:
        """Take an engine out of service and start it again; `life` is the one in which it failed.

        Raises:
            EngineLostError: it cannot be started again, or that was done too often.
        """
        if life != self.lives[index]:
            return
        if self.restart is None or not hasattr(self.engines[index], "restart"):
            raise error
        if self.restarts == self.most:
            error.add_note(f"engines were started again {self.restarts} times already: --max-engine-restarts")
            raise error
        self.restarts += 1
        self.lives[index] += 1
        logger.warning("engine %d is lost and starts again (%d of %d): %s", index, self.restarts, self.most, error)
        self._starting[index] = asyncio.ensure_future(self.restart(self.engines[index]))

    async def one_serving(self) -> None:
        """Return when at least one engine is in service. One caller does what there is to do; others wait for him.

        Raises:
            EngineLostError: none can be started again.
        """
        async with self._turn:
            if self._hopeless is not None:
                raise self._hopeless
            if not self.serving():
                assert self.resync is not None  # an engine is out of service where it can be started again
                try:
                    await self.started()
                    await self.resync()
                except MilesError as error:
                    self._hopeless = error
                    raise

    async def started(self) -> None:
        """Wait until every lost engine is up again; its weights are undefined.

        Raises:
            EngineLostError: one did not come up.
        """
        for index, task in list(self._starting.items()):  # others may be lost meanwhile
            try:
                await asyncio.shield(task)
            except MilesError as error:
                raise EngineLostError(f"engine {index} was lost and did not start again: {error}") from error

    async def find_lost(self) -> None:
        """Ask every engine whether it is there, and return when those are up again that were not.

        Raises:
            EngineLostError: see `lose` and `started`.
        """
        for index in self.serving():
            try:
                await self.engines[index].health()
            except EngineLostError as error:
                self.lose(index, self.lives[index], error)
            except EngineError as error:  # whatever that is, the next thing asked of it will tell
                logger.debug("engine %d: %s", index, error)
        await self.started()

    def have_weights(self) -> None:
        """All that are up have received them just now."""
        self._starting = {index: task for index, task in self._starting.items() if not task.done()}

    async def close(self) -> None:
        """Engines still on their way up are left to whoever closes them."""
        tasks = list(self._starting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_lost(call: Awaitable[None]) -> None:
    """A lost engine has nothing under way and nothing to move; whoever needs it next finds out."""
    with suppress(EngineLostError):
        await call
