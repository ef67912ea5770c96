"""Several workers as the driver sees them: call all of them, wait, and say which one failed first."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from miles.errors import WorkerError
from miles.workers.failure import Failure, WorkerFailure, first_cause, standing

PATIENCE = 5.0
"""Seconds that the other ranks have to answer, or to say what is wrong with them, after one has failed."""
PAUSE = 0.1
"""Part of the time limit between two pulses: a process that stands still is found so much later."""
START = 600.0
"""Seconds that building an object may take at least, whatever calls may: libraries are imported, weights are read."""


class Link(Protocol):
    """One worker process, from the driver's end."""

    async def request(self, method: str, *args: Any) -> Any:
        """A method of the process's `WorkerHost`.

        Raises:
            WorkerFailure: it raised, or the process died.
        """

    async def stop(self) -> None:
        """Let calls under way end, then end the process; kill it if it does not. Twice is once."""

    def kill(self) -> None:
        """End the process at once."""


@dataclass
class Fate:
    """What groups in the same processes share."""

    end: str = ""
    """Why the processes were ended, in a line."""


class Workers:
    """The `WorkerGroup` of every executor: one link a rank.

    Args:
        name: what the group is called in messages: `train`, `rollout`.
        address: at which the workers' machines reach the driver's.
        timeout: seconds after which a call without an answer is taken to hang, and processes are asked for a pulse
            while `call_one` waits; None to wait for ever.
        key, fate: of these objects in their processes, and of the processes; for groups that `beside` makes.
    """

    def __init__(
        self,
        name: str,
        links: Sequence[Link],
        *,
        address: str,
        timeout: float | None,
        key: str = "0",
        fate: Fate | None = None,
    ):
        self.name, self.links, self.address, self.timeout, self.key = name, links, address, timeout, key
        self.size, self._fate = len(links), fate or Fate()
        self._keys = itertools.count(1)
        self._alone = 0
        self._watch: asyncio.Future | None = None

    @classmethod
    async def build(cls, group: Workers, target: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Workers:
        """Have every process of a group build its object."""
        group._check()
        requests = [link.request("build", group.key, target, args, kwargs) for link in group.links]
        await group._answers(target, requests, group.timeout and max(group.timeout, START))
        return group

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        requests = [self._request(link, method, args, kwargs) for link in self.links]
        return await self._answers(method, requests, self.timeout)

    async def call_each(self, method: str, args: Sequence[tuple]) -> list[Any]:
        pairs = list(zip(self.links, args, strict=True))
        return await self._answers(method, [self._request(link, method, own, {}) for link, own in pairs], self.timeout)

    async def call_one(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Of one rank alone, as long as the processes have a pulse: engines take their time."""
        answer = asyncio.ensure_future(self._request(self.links[rank], method, args, kwargs))
        watch = self._watch = self._watch or asyncio.ensure_future(self._feel_pulses(method))
        self._alone += 1
        try:
            await asyncio.wait([answer, watch], return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else watch.result()
        except WorkerFailure as error:
            failures = [error.failure, *await self._ends(error.failure)]
            self._check()
            raise first_cause(failures, self.name, method)[0] from None
        finally:
            self._alone -= 1
            if not self._alone:
                watch.cancel()
                self._watch = None
            answer.cancel()
            await asyncio.wait([answer])  # until the worker has been told
            _failures([answer, watch])

    async def beside(self, name: str, target: str, *args: Any, **kwargs: Any) -> Workers:
        """Another object in each of these processes, `Target(rank, size, ...)`, as a group of its own."""
        key = f"{self.key}.{next(self._keys)}"
        other = Workers(name, self.links, address=self.address, timeout=self.timeout, key=key, fate=self._fate)
        return await Workers.build(other, target, args, kwargs)

    async def close(self) -> None:
        """End the processes; a group beside another one leaves them to it."""
        if self.key == "0":
            await asyncio.gather(*(link.stop() for link in self.links))
        else:
            drops = [asyncio.ensure_future(link.request("drop", self.key)) for link in self.links]
            await asyncio.wait(drops, timeout=PATIENCE)  # one that hangs ends with its process
            for drop in drops:
                drop.cancel()
            _failures(drops)

    def _request(self, link: Link, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Awaitable[Any]:
        self._check()
        return link.request("call", self.key, method, args, kwargs)

    def _check(self) -> None:
        if self._fate.end:
            raise self._ended()

    def _ended(self) -> WorkerError:
        return WorkerError(f"the {self.name} workers have ended: {self._fate.end}")

    async def _feel_pulses(self, method: str) -> None:
        """For ever, for all calls of one rank alone that are under way; `method` is the first one's.

        Raises:
            WorkerError: a process stood still for the time limit, or has died.
        """
        while self.timeout is not None:
            await asyncio.sleep(self.timeout * PAUSE)
            await self._answers(method, [link.request("pulse") for link in self.links], self.timeout)
        await asyncio.Event().wait()

    async def _answers(self, method: str, requests: Sequence[Awaitable[Any]], timeout: float | None) -> list[Any]:
        """Everybody's answer, in the order of ranks.

        Raises:
            WorkerError: one failed, or does not answer. Where some wait for it in vain, all processes are ended.
        """
        tasks = [asyncio.ensure_future(request) for request in requests]
        try:
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            failed = _failures(tasks)
            if failed:
                await asyncio.wait(tasks, timeout=PATIENCE)
            waiting = [rank for rank, task in enumerate(tasks) if not task.done()]
            why = "was waiting when it was ended" if failed else f"no answer in {timeout} s"
            silent = await asyncio.gather(*(self._whereabouts(rank, why) for rank in waiting))
            silent = [failure for failure in silent if not tasks[failure.rank].done()]  # it may have answered meanwhile
            failed += [error for error in _failures(tasks) if error not in failed]
            if not failed and not silent:
                return [task.result() for task in tasks]
            raise self._first_cause(method, failed, silent)
        finally:
            for task in tasks:
                task.cancel()
            _failures(tasks)

    def _first_cause(self, method: str, errors: Sequence[BaseException], silent: Sequence[Failure]) -> BaseException:
        """What to raise, after ending the processes if they cannot go on together."""
        failures = [*(error.failure for error in errors if isinstance(error, WorkerFailure)), *silent]
        own = [error for error in errors if not isinstance(error, WorkerFailure)]  # of the driver's process
        if own:
            error, line = own[0], f"{method} failed in the driver: {type(own[0]).__name__}: {own[0]}"
        elif self._fate.end:  # for a failure of another group in these processes
            return self._ended()
        else:
            error, line = first_cause(failures, self.name, method)
        if any(failure.kind != "raised" for failure in failures):
            self._fate.end = line
            for link in self.links:
                link.kill()
        return error

    async def _ends(self, failure: Failure) -> list[Failure]:
        """Of other ranks, where they may be why one raised: it knows of a broken connection before the driver does."""
        if failure.kind != "raised" or failure.error is not None:
            return []
        alive = [asyncio.ensure_future(link.request("stacks")) for link in self.links]
        await asyncio.wait(alive, timeout=PATIENCE)
        for asked in alive:
            asked.cancel()
        ends = [error.failure for error in _failures(alive) if isinstance(error, WorkerFailure)]
        return [end for end in ends if end.kind == "died" and end.rank != failure.rank]

    async def _whereabouts(self, rank: int, why: str) -> Failure:
        """Of a rank that does not answer."""
        try:
            stacks = await asyncio.wait_for(self.links[rank].request("stacks"), PATIENCE)
        except (WorkerFailure, TimeoutError):
            stacks = "nor does it say where it stands"
        return standing(rank, stacks, why)


def _failures(tasks: Sequence[asyncio.Future]) -> list[BaseException]:
    """What was raised so far, in the order of ranks. (Exceptions that nobody looks at are reported by asyncio.)"""
    return [error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())]


class DirectLink:
    """The link to a host in the driver's own process: errors arrive as they were raised."""

    def __init__(self, host: Any):
        self.host = host

    async def request(self, method: str, *args: Any) -> Any:
        return await getattr(self.host, method)(*args)

    async def stop(self) -> None:
        await self.host.drop("")

    def kill(self) -> None:
        raise WorkerError("the worker lives in the driver's process, and does not answer")
