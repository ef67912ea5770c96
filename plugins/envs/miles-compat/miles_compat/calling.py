"""Functions of upstream: how they are found, and the event loop that they run in.

Upstream runs them in a loop of its own thread, which lives as long as the process. So it is here: a semaphore that
their module made at import keeps its loop, and what blocks in them blocks no engine. The core awaits them from its
own loop.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, TypeVar

from miles.api import ConfigError, import_target
from miles_compat.modules import offer_modules

T = TypeVar("T")


def load_function(path: str) -> Any:
    """What `my_module.my_function` names; a colon may stand before the function.

    Raises:
        ConfigError: the path names no function.
        PluginLoadError: there is no such module or attribute, or importing it failed.
    """
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or not attribute:
        raise ConfigError(f"{path!r} names no function: write my_module.my_function")
    offer_modules()
    return import_target(f"{module}:{attribute}", path)


@cache
def their_loop() -> asyncio.AbstractEventLoop:
    """The loop in which functions of upstream run."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="miles-compat", daemon=True).start()
    return loop


async def there(work: Coroutine[Any, Any, T]) -> T:
    """Wait for something of theirs. Cancelling it cancels that."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, their_loop()))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Theirs: wait in a thread that has no loop."""
    return asyncio.run_coroutine_threadsafe(work, their_loop()).result()


async def called(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a function returns, whether it is `async` or not."""
    result = function(*arguments, **keywords)
    return await result if inspect.isawaitable(result) else result
