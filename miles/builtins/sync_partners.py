"""Who takes part in a weight sync, and in which processes they live."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from miles.api import RolloutEngine, WeightGroup, WeightSyncError, WorkerError, WorkerGroup
from miles.toolkit import this_process

ANSWER = f"{__name__}:answer"
PATIENCE = 20.0
"""Seconds that all others have to come to an end, after one has failed."""


class AbandonedError(WeightSyncError):
    """Given up because somebody else failed; whose error is the one to show."""


def receivers(transport: str, engines: Sequence[RolloutEngine]) -> list[RolloutEngine]:
    """The engines that hold a model.

    Raises:
        WeightSyncError: one of them does not receive by this transport.
    """
    found = [engine for engine in engines if engine.generates]
    for engine in found:
        if transport not in engine.accepts:
            raise WeightSyncError(
                f"weight sync {transport}: {type(engine).__name__} receives weights by "
                f"{', '.join(sorted(engine.accepts)) or 'no transport'}; choose one of these with --weight-sync"
            )
    return found


def answer(weights: Iterable[WeightGroup]) -> str:
    """Runs in a train rank: where it is."""
    return this_process()


@contextmanager
def walked(weights: Iterable[WeightGroup]) -> Iterator[Iterator[WeightGroup]]:
    """A rank's walk over its weights, which goes to the end whatever happens on the way: others wait for its part."""
    walk = iter(weights)
    try:
        yield walk
    finally:
        for _ in walk:
            pass


@contextmanager
def delivering(transport: str, version: int) -> Iterator[None]:
    """Around a push. Raises WeightSyncError when it fails; or WorkerError, after which a run may start again."""
    failed = f"weight sync {transport}: version {version} did not arrive"
    try:
        yield
    except WorkerError as error:
        raise WorkerError(f"{failed}: {error}") from error
    except WeightSyncError as error:
        raise WeightSyncError(f"{failed}: {error}") from error
    except Exception as error:
        raise WeightSyncError(f"{failed}: {type(error).__name__}: {error}") from error


async def ranks(workers: WorkerGroup) -> list[str]:
    """The process of each train rank."""
    return await workers.call("send_weights", ANSWER)


async def rounds(engines: Sequence[RolloutEngine]) -> list[dict[str, RolloutEngine]]:
    """Engines by process. Of those that share one, which take turns in the thread that computes there, each has a round
    of its own: none may wait for another."""
    found: list[dict[str, RolloutEngine]] = []
    for index, engine in enumerate(engines):
        process = (await engine.health()).process or f"engine {index}"
        free = next((members for members in found if process not in members), None)
        if free is None:
            found.append({process: engine})
        else:
            free[process] = engine
    return found


async def together(
    parts: Iterable[Awaitable[Any]], on_failure: Callable[[int, BaseException], None] = lambda part, error: None
) -> list[Any]:
    """What all of them return. Of several errors the first is raised that is not another one's echo, as soon as nobody
    is at work any more, or after `PATIENCE` seconds. `on_failure` is told of the first, and
    whose it is."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and task.exception()]
        if waiting:
            on_failure(tasks.index(failed[0]), _error_of(failed[0]))
            await asyncio.wait(waiting, timeout=PATIENCE)
            failed += [task for task in tasks if task in waiting and task.done() and task.exception()]
        errors = [_error_of(task) for task in failed]
        if errors:
            raise next((error for error in errors if not isinstance(error, AbandonedError)), errors[0])
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _error_of(task: asyncio.Future) -> BaseException:
    error = task.exception()
    assert error is not None
    return error
