"""Several answers at once, for one client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def all_of(work: Sequence[Awaitable[Item]]) -> list[Item]:
    """Results in order. The first error ends the others, and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def merged(sources: Sequence[AsyncIterator[Item]]) -> AsyncGenerator[tuple[int, Item], None]:
    """`(index, item)` of several streams, as they come. The first error ends the others, and is raised."""
    queue: asyncio.Queue[tuple[int, Item] | None] = asyncio.Queue()

    async def drain(index: int, source: AsyncIterator[Item]) -> None:
        try:
            async for item in source:
                queue.put_nowait((index, item))
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(drain(index, source)) for index, source in enumerate(sources)]
    try:
        for _ in tasks:
            while (item := await queue.get()) is not None:
                yield item
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
