"""Several answers at once: all of them, or the first error and an end to the others."""

import asyncio
from contextlib import aclosing

import pytest
from miles_serve.concurrent import all_of, merged

ENDED = []


async def one(name, seconds, error=None):
    try:
        await asyncio.sleep(seconds)
        if error:
            raise error
        return name
    except asyncio.CancelledError:
        ENDED.append(name)
        raise


async def several(name, count, error=None):
    for i in range(count):
        yield await one(f"{name}{i}", 0.001)
    if error:
        raise error


def test_results_come_in_order():
    assert asyncio.run(all_of([one("slow", 0.02), one("fast", 0)])) == ["slow", "fast"]


def test_the_first_error_ends_the_others():
    ENDED.clear()
    with pytest.raises(ValueError, match="no"):
        asyncio.run(all_of([one("slow", 60), one("broken", 0, ValueError("no"))]))
    assert ENDED == ["slow"]


def test_streams_are_merged_as_they_come():
    async def main():
        return [item async for item in merged([several("a", 3), several("b", 2), several("c", 0)])]

    items = asyncio.run(main())
    assert [item for index, item in items if index == 0] == ["a0", "a1", "a2"]
    assert [item for index, item in items if index == 1] == ["b0", "b1"]
    assert len(items) == 5


def test_an_error_of_one_stream_ends_the_others():
    async def endless():
        while True:
            yield await one("endless", 0.001)

    async def main():
        return [item async for item in merged([endless(), several("b", 2, ValueError("no"))])]

    ENDED.clear()
    with pytest.raises(ValueError, match="no"):
        asyncio.run(main())
    assert ENDED == ["endless"]


def test_who_leaves_ends_all_streams():
    async def main():
        async with aclosing(merged([several("a", 10**6), several("b", 10**6)])) as items:
            async for _ in items:
                return

    ENDED.clear()
    asyncio.run(main())
    assert len(ENDED) == 2
