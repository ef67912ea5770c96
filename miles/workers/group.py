"""Several workers as the driver sees them: call all of them, wait, and say which one failed first."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from miles.errors import WorkerError
from miles.workers.failure import Failure, WorkerFailure, raise_first

PATIENCE = 5.0
"""Seconds that the other ranks have to answer, or to say what is wrong with them, after one has failed."""


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


class Workers:
    """The `WorkerGroup` of every executor: one link a rank.

    Args:
        name: what the group is called in messages: `train`, `rollout`.
        address: at which the workers' machines reach the driver's.
        timeout: seconds after which a call without an answer is taken to hang; None to wait for ever.
        key: of these objects in their processes; a group made by `beside` has another one.
    """

    def __init__(self, name: str, links: Sequence[Link], *, address: str, timeout: float | None, key: str = "0"):
        self.name, self.links, self.address, self.timeout, self.key = name, links, address, timeout, key
        self.size = len(links)
        self._keys = itertools.count(1)

    @classmethod
    async def build(cls, group: Workers, target: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Workers:
        """Have every process of a group build its object."""
        requests = [link.request("build", group.key, target, args, kwargs) for link in group.links]
        await group._answers(target, requests)
        return group

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return await self._answers(method, [self._request(link, method, args, kwargs) for link in self.links])

    async def call_each(self, method: str, args: Sequence[tuple]) -> list[Any]:
        pairs = zip(self.links, args, strict=True)
        return await self._answers(method, [self._request(link, method, own, {}) for link, own in pairs])

    async def call_one(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Of one rank alone, without a time limit: engines take their time."""
        try:
            return await self._request(self.links[rank], method, args, kwargs)
        except WorkerFailure as error:
            raise_first([error.failure], self.name, method)

    async def beside(self, name: str, target: str, *args: Any, **kwargs: Any) -> Workers:
        """Another object in each of these processes, `Target(rank, size, ...)`, as a group of its own."""
        key = f"{self.key}.{next(self._keys)}"
        other = Workers(name, self.links, address=self.address, timeout=self.timeout, key=key)
        return await Workers.build(other, target, args, kwargs)

    async def close(self) -> None:
        """End the processes; a group beside another one leaves them to it."""
        if self.key == "0":
            await asyncio.gather(*(link.stop() for link in self.links))
        else:
            requests = (link.request("drop", self.key) for link in self.links)
            await asyncio.gather(*requests, return_exceptions=True)

    def _request(self, link: Link, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Awaitable[Any]:
        return link.request("call", self.key, method, args, kwargs)

    async def _answers(self, method: str, requests: Sequence[Awaitable[Any]]) -> list[Any]:
        """Everybody's answer, in the order of ranks.

        Raises:
            WorkerError: one failed, or does not answer. Where some are left waiting for it, all processes are killed.
        """
        tasks = [asyncio.ensure_future(request) for request in requests]
        try:
            _, waiting = await asyncio.wait(tasks, timeout=self.timeout, return_when=asyncio.FIRST_EXCEPTION)
            failed = [task for task in tasks if task.done() and task.exception()]
            if not failed and not waiting:
                return [task.result() for task in tasks]
            if waiting and failed:
                await asyncio.wait(waiting, timeout=PATIENCE)
            failures = [_failure(task) for task in sorted(failed, key=tasks.index)]
            later = [task for task in tasks if task not in failed and task.done() and task.exception()]
            failures += [_failure(task) for task in later]
            silent = [rank for rank, task in enumerate(tasks) if not task.done()]
            failures += await asyncio.gather(*(self._whereabouts(rank, bool(failed)) for rank in silent))
            if silent:
                for link in self.links:
                    link.kill()
            raise_first(failures, self.name, method)
        finally:
            for task in tasks:
                task.cancel()

    async def _whereabouts(self, rank: int, others_failed: bool) -> Failure:
        """Of a rank that does not answer."""
        try:
            text = await asyncio.wait_for(self.links[rank].request("stacks"), PATIENCE)
        except (WorkerFailure, TimeoutError):
            text = "nor does it say where it stands"
        waited = "was waiting when it was ended" if others_failed else f"no answer in {self.timeout} s"
        return Failure(rank, "silent", f"{text}\n{waited}")


def _failure(task: asyncio.Future) -> Failure:
    error = task.exception()
    if not isinstance(error, WorkerFailure):
        assert error is not None
        raise error
    return error.failure


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
