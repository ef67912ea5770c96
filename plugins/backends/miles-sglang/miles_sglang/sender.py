"""Sends requests to servers until they are answered: tries again what may succeed, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from miles.api import EngineError
from miles_sglang.client import Body, LateError, MalformedError, PassingError
from miles_sglang.fleet import CONTROL, Fleet
from miles_sglang.flights import Flight, Flights
from miles_sglang.options import ClientOptions
from miles_sglang.replies import Piece, Reader
from miles_sglang.router import DROPPED, ROUTING_KEY
from miles_sglang.standing import Standing

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""Seconds before the second try, and at most before any later one: they double."""
GOODBYE = 10.0
"""Seconds for a server to take note that nobody waits for a request any more."""
AGAIN, LATER = 0.02, 0.5
"""Seconds after which an abort is repeated, at first and in the end."""
ALIVE = "/server_info"
"""What is asked to know whether a server lives: its scheduler answers, also while it is paused or asleep. (`/health`
generates a token.)"""
SILENCES = 3
"""So often in a row a server does not answer before it is given up."""
SECOND_LOOKS = (0.5, 2.0)
"""Seconds after which a server that did not answer is asked again: a listener may be full, or away for a moment."""

logger = logging.getLogger("miles")

T = TypeVar("T")
Take = Callable[[Piece], None]


class Sender:
    """Of one engine. Request ids are its own, one for each try: nothing that is late can be taken for another's."""

    def __init__(
        self,
        fleet: Fleet,
        flights: Flights,
        standing: Standing,
        options: ClientOptions,
        *,
        vocabulary: int,
        alone: bool,
    ):
        """`alone`: nobody else sends requests to these servers."""
        self.fleet, self.flights, self.standing = fleet, flights, standing
        self.options, self.vocabulary, self.alone = options, vocabulary, alone
        self.counts: Counter[str] = Counter()
        self._name, self._sent = uuid.uuid4().hex[:8], 0
        self._looking = asyncio.Lock()
        self._goodbyes: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------ one request

    async def send(self, flight: Flight, body: Callable[[], dict[str, Any]], take: Take) -> str:
        """Ask once the gate is open, and again after a fault that may pass.

        Args:
            body: what is still to be asked, without an id.
            take: gets what comes, checked, piece by piece.

        Returns:
            Why it ended: `abort` too when it was aborted before it was sent.

        Raises:
            EngineLostError: a server is gone.
            EngineError: the server refuses the request, or all tries failed.
        """
        tries = 0
        while await self._admitted(flight):
            self.standing.check_serves()
            try:
                return await self._try(flight, body(), take)
            except PassingError as error:
                tries += 1
                await self._recover(flight, error, tries)
        return "abort"

    async def _admitted(self, flight: Flight) -> bool:
        """Wait for the gate; False for one that was aborted meanwhile."""
        await self.flights.gate.until(lambda: flight.aborted or self.standing.gone or self.flights.open)
        return not flight.aborted

    async def _try(self, flight: Flight, body: dict[str, Any], take: Take) -> str:
        self._sent += 1
        rid = f"{self._name}.{self._sent}.{flight.id}$"  # servers abort by prefix: no id begins another
        body |= {"rid": rid, "extra_key": str(self.standing.version)}  # what older weights cached is never matched
        with self.flights.sent(flight, rid):
            try:
                return await self._exchange(flight, body, take)
            except TimeoutError as error:
                await self._say_goodbye(rid)
                raise LateError(f"request {flight.id!r} got no answer in {self.options.timeout:g} s") from error
            except PassingError:
                await self._say_goodbye(rid)
                raise
            except asyncio.CancelledError:
                task = asyncio.get_running_loop().create_task(self._say_goodbye(rid))
                self._goodbyes.add(task)
                task.add_done_callback(self._goodbyes.discard)
                raise

    async def _exchange(self, flight: Flight, body: dict[str, Any], take: Take) -> str:
        try:
            async with asyncio.timeout(self.options.timeout) as flight.limit:
                return await self._ask(flight, body, take)
        finally:
            flight.limit = None

    async def _ask(self, flight: Flight, body: dict[str, Any], take: Take) -> str:
        url = self.fleet.entrance(flight.key, direct=not DROPPED.isdisjoint(body)) + "/generate"
        reader = Reader(body["rid"], self.vocabulary, "return_sampling_mask" in body)
        headers = {ROUTING_KEY: flight.key} if self.fleet.router else None
        if not body.get("stream"):
            piece = reader.read(await self.fleet.client.ask(url, body, headers=headers))
            if not piece.finish_reason:
                raise MalformedError(f"{url} answered without saying why it ended")
            self._check_version(piece, url)
            take(piece)
            return piece.finish_reason
        piece, anything = Piece(), False
        async with aclosing(self.fleet.client.events(url, body, headers)) as chunks:
            async for chunk in chunks:
                piece = reader.read(chunk, first=not anything)
                anything = anything or bool(piece.tokens)
                self._check_version(piece, url)
                take(piece)
        if not piece.finish_reason:
            raise MalformedError(f"{url} ended a stream without saying why")
        return piece.finish_reason

    def _check_version(self, piece: Piece, url: str) -> None:
        """A server that was started again behind our back answers, too, from weights that nobody knows."""
        standing = self.standing
        if piece.version not in (standing.version, standing.coming):
            self.lose(f"{url} answers from weights of version {piece.version}, and {standing.version} was sent to it")
            raise MalformedError(standing.lost)

    async def _say_goodbye(self, rid: str) -> None:
        """Nobody waits for it any more, so that no server need go on with it."""
        if self.standing.gone and self.alone:
            return  # they end as well
        try:
            await self.fleet.tell("/abort_request", {"rid": rid}, GOODBYE, tries=1)
        except EngineError as error:  # then it goes on until its server notices, and nobody hears of it
            logger.debug("abort of %s: %s", rid, error)

    async def _recover(self, flight: Flight, error: PassingError, tries: int) -> None:
        """Return when it is time for the next try.

        Raises:
            EngineLostError: there is nobody to try it with.
            EngineError: this was the last one.
        """
        if not self.standing.gone:  # what a lost engine leaves unanswered is counted as one loss
            self.counts[error.kind] += 1
        last = tries > self.options.retries
        await self._look(ask=last or isinstance(error, LateError))
        self.standing.check_there()
        if last:
            raise EngineError(f"request {flight.id!r} failed {tries} times, the last time so: {error}") from error
        self.counts["retries"] += 1
        wait = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
        await self.flights.gate.until(lambda: flight.aborted or self.standing.gone, wait)

    # ------------------------------------------------------------------------------------------- what is no request

    async def tell(self, path: str, body: Body = None, timeout: float = CONTROL, tries: int = 3) -> None:
        """Every server, as `Fleet.tell`.

        Raises:
            EngineLostError: a server is gone.
            EngineError: one of them did not do it.
        """
        await self._checked(self.fleet.tell(path, body, timeout, tries))

    async def tell_each(self, path: str, bodies: Sequence[Body], timeout: float) -> None:
        """Every server something else, once. Raises as `tell`."""
        await self._checked(self.fleet.tell_each(path, bodies, timeout))

    async def ask(self, path: str) -> list[dict[str, Any]]:
        """What each server says. Raises as `tell`."""
        return await self._checked(self.fleet.ask(path))

    async def _checked(self, said: Awaitable[T]) -> T:
        try:
            return await said
        except PassingError:
            await self._look(ask=True)
            self.standing.check_there()
            raise

    # ---------------------------------------------------------------------------------------------- all of them

    async def recall(self, chosen: Callable[[], Sequence[Flight]], every: bool = False) -> None:
        """Have requests aborted, and return when no server has one of them any more; `every`: these are all there are.
        It is said again and again: a server forgets an abort that overtakes its request."""
        wait = AGAIN
        while there := chosen():
            bodies = [{"abort_all": True}] if every and self.alone else [{"rid": flight.rid} for flight in there]
            said = (self.fleet.tell("/abort_request", body, GOODBYE, tries=1) for body in bodies)
            for error in await asyncio.gather(*said, return_exceptions=True):
                if isinstance(error, EngineError):  # its requests find out what that means
                    logger.debug("abort: %s", error)
            await self.flights.traffic.until(lambda: not chosen(), wait)
            wait = min(2 * wait, LATER)

    # ---------------------------------------------------------------------------------------- whether there is anybody

    async def watch(self) -> None:
        """For as long as the engine runs: find servers that have died or hang."""
        silent = 0
        while True:
            await asyncio.sleep(self.options.health_check_interval)
            if self.standing.gone:
                continue
            await self._look(ask=False)
            if self.flights.receiving or not self.flights.out:
                silent = 0
            elif why := await self.fleet.silence(ALIVE, self.options.health_check_timeout):
                silent += 1
                self.counts["silences"] += 1
                if silent == SILENCES:
                    self.lose(why)
            else:
                silent = 0

    async def _look(self, ask: bool) -> None:
        """Notice a server that is gone; with `ask` also one that runs and answers nothing, asked again and again."""
        async with self._looking:
            if self.standing.gone:
                return
            why = await self._silence() if ask else self.fleet.death()
            if why:
                self.lose(why)

    async def _silence(self) -> str:
        """Why one of them does not answer; empty when all do."""
        why = ""
        for wait in (0.0, *SECOND_LOOKS):
            await asyncio.sleep(wait)
            if death := self.fleet.death():
                return death
            if not (why := await self.fleet.silence(ALIVE, self.options.health_check_timeout)):
                break
        return why

    def lose(self, why: str) -> None:
        """The engine is gone: tell all that wait for it."""
        if not self.standing.gone:
            self.counts["lost"] += 1
            self.standing.lost = why
        self.interrupt()

    def interrupt(self) -> None:
        """End all waiting: for servers, for the gate, for the next try."""
        for flight in self.flights.all:
            flight.interrupt()
        self.flights.gate.tell()

    async def close(self, seconds: float) -> None:
        """End all waiting, and the servers that are ours; for so long requests may say that they are over."""
        self.interrupt()
        await self.flights.traffic.until(lambda: not self.flights.all, seconds)
        if self._goodbyes:
            await asyncio.wait(self._goodbyes, timeout=seconds)
        await self.fleet.close()
        await self.fleet.client.close()
