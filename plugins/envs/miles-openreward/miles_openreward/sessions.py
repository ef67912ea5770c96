"""Sessions with environments: a connection that all trajectories of a run share, and a keeper who closes what is open.

A session is something that runs elsewhere, a sandbox perhaps, and may cost money. The trajectory that opened it closes
it, also when it failed or was cancelled. What is still open when the event loop ends, because closing was cut short,
the keeper closes. After a SIGKILL nobody does: servers end sessions of which they hear nothing (the SDK's own after a
quarter of an hour).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from weakref import WeakKeyDictionary

from openreward import AsyncEnvironmentsAPI, AsyncOpenReward, AsyncSession
from openreward.api.environments.types import Task
from openreward.api.sandboxes.secrets import WELL_KNOWN_SECRETS

logger = logging.getLogger("miles")

GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
"""What a server answers that has no such session any more."""
PATIENCE = 10.0
"""Seconds that one who closes a session waits for its opening, and then for the server."""


class Closing(AsyncSession):
    """The SDK's session, which remembers why its server did not end it: the SDK says nothing of that."""

    failure: Exception | None = None

    async def _pre_delete(self) -> None:
        self.failure = None
        try:
            await super()._pre_delete()
        except Exception as error:
            if getattr(error, "status", None) not in GONE:
                self.failure = error
            raise


class Session:
    """One task of an environment, from its opening to its end."""

    def __init__(self, sdk: Closing, open_sessions: set[Session]):
        self.sdk, self._open = sdk, open_sessions
        self._opening: asyncio.Task | None = None

    async def open(self) -> None:
        """Whoever waits may be cancelled: the opening goes on, so that it is known what there is to close."""
        self._open.add(self)
        self._opening = asyncio.create_task(self.sdk.__aenter__())
        await asyncio.shield(self._opening)

    async def close(self) -> None:
        """End the session, or its opening when that takes too long. What cannot be closed is left to the server.

        Raises:
            Exception: the server did not end it, with what the SDK swallowed; TimeoutError after `PATIENCE`.
        """
        if self not in self._open:
            return
        if self._opening is not None:
            await asyncio.wait([self._opening], timeout=PATIENCE)
            self._opening.cancel()
            await asyncio.wait([self._opening])
        try:
            async with asyncio.timeout(PATIENCE):
                await self.sdk.__aexit__(None, None, None)
        except TimeoutError:
            self.sdk.failure = TimeoutError(f"the server did not end its session within {PATIENCE:g} s")
        self._open.discard(self)  # not when this was cancelled: the keeper closes it then
        if self.sdk.failure is not None:
            raise self.sdk.failure


class Connection:
    """One address, in one event loop."""

    def __init__(self, base_url: str | None):
        # The SDK tells its key to every server it speaks to: one of your own is not told that of openreward.ai.
        self.api = AsyncEnvironmentsAPI(base_url, api_key="") if base_url else AsyncOpenReward().environments
        self._open: set[Session] = set()
        self._keeper = asyncio.create_task(self._keep(base_url))

    def session(self, task: Task, variant: str | None, secrets: Mapping[str, str]) -> Session:
        """A session that is not open yet.

        Args:
            secrets: name -> value. Those whose names the SDK knows may leave a sandbox for whom they are meant; others
                stay within.
        """
        environment = self.api.get(task.deployment_name, variant=variant)
        told = {name: (value, WELL_KNOWN_SECRETS.get(name, [])) for name, value in secrets.items()}
        sdk = Closing(environment, task=task, secrets=told or None, api_key=environment.api_key)
        return Session(sdk, self._open)

    async def _keep(self, base_url: str | None) -> None:
        """Until the event loop ends: it cancels its tasks then, and waits for what they have to do."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_future()
        finally:
            _connections[loop].pop(base_url, None)
            closed = await asyncio.gather(*(session.close() for session in self._open), return_exceptions=True)
            if failed := [type(error).__name__ for error in closed if error is not None]:  # a text may hold secrets
                what = "openreward: sessions that were not ended, and go on until their server hears too little of them"
                logger.warning("%s: %d (%s)", what, len(failed), ", ".join(sorted(set(failed))))
            await self.api.aclose()


_connections: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str | None, Connection]] = WeakKeyDictionary()


def connection(base_url: str | None) -> Connection:
    """That of the running event loop; `None` is openreward.ai."""
    known = _connections.setdefault(asyncio.get_running_loop(), {})
    if base_url not in known:
        known[base_url] = Connection(base_url)
    return known[base_url]
