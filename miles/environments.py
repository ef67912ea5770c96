"""The environments of a task set: built, held to limits, and kept from holding up a run.

`Environments` stands where a generate function asks for an environment. What it hands out has the methods of the
protocol; around each call there are

    a place     of the calls, or of the open environments, that its limits allow at once. Who waits for one asks no
                engine for anything
    a time-out  then the call is cancelled, and left behind if it does not heed that
    a check     of what it returned

Whatever goes wrong is an `EnvironmentFault`, which is counted, and which generate functions write on the sample.
"""

from __future__ import annotations

import asyncio
import math
import time
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, SupportsFloat, TypeVar

from miles.errors import ConfigError, HookError, MilesError
from miles.log import logger
from miles.protocols import Environment
from miles.targets import defined_at, described
from miles.types import Action, Metrics, Observation, Prompt, StepResult

ENVIRONMENT_FAULT = "environment_fault"
"""Key of `Sample.metadata`: `method`, `kind` (`error` or `timeout`) and `seconds` of what made the sample FAILED."""
ENVIRONMENT_INFO = "environment"
"""Key of `Sample.metadata`: the `info` of all steps, later ones over earlier ones. Rows of `rollouts/` have it, too."""
COUNTS = ("calls", "errors", "timeouts", "close_errors")
"""Of the names in `Environments.metrics`, those that say what happened; the others say how long it took, and how many
there were at once."""
UNWINDING = 1.0
"""Seconds that a cancelled call has to put things in order; then it is left behind."""

Answer = TypeVar("Answer")
_left_behind: set[asyncio.Future[Any]] = set()


@dataclass(frozen=True)
class EnvironmentLimits:
    """How many at once, and how long: over all environments of a task set. None leaves it to others, see `over`."""

    calls: int | None = None
    """Most resets and steps at once."""
    episodes: int | None = None
    """Most environments open at once, from the reset to the end of `close`."""
    reset_timeout: float | None = None
    """Seconds of a `reset`, without those in which it waited for a place."""
    step_timeout: float | None = None
    close_timeout: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ConfigError(f"EnvironmentLimits({name}={value!r}): must be more than 0")

    def over(self, others: EnvironmentLimits) -> EnvironmentLimits:
        """These, and those of the others where these say nothing."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(others, **{name: value for name, value in said.items() if value is not None})


UNSAID = EnvironmentLimits(reset_timeout=600.0, step_timeout=600.0, close_timeout=30.0)
"""Where neither the task set nor the environment says anything."""


class EnvironmentFault(Exception):
    """What is wrong with an environment: what its own code raised, or returned in place of what is expected, or that
    it took too long."""

    def __init__(self, message: str, method: str = "", kind: str = "error", seconds: float = 0.0):
        super().__init__(message)
        self.facts = {"method": method, "kind": kind, "seconds": round(seconds, 3)}


class RolloutHalted(Exception):
    """A trajectory waited for its first call, and meanwhile the rollout ended: nothing was begun. The rollout takes the
    sample back as it is; a generate function has nothing to do but close the environment, as it always does."""


class Places:
    """At most so many at once; remembers the most there were."""

    def __init__(self, limit: int | None):
        self._free = None if limit is None else asyncio.Semaphore(limit)
        self.taken = self.most = 0
        self.waited = 0.0
        """Seconds, of all together."""

    async def take(self) -> None:
        if self._free is not None:
            started = time.perf_counter()
            await self._free.acquire()
            self.waited += time.perf_counter() - started
        self.taken += 1
        self.most = max(self.most, self.taken)

    def give_back(self) -> None:
        self.taken -= 1
        if self._free is not None:
            self._free.release()


class Environments:
    """Builds the environments of one task set, and holds them to its limits and to their own.

    A call makes an environment. The limits are those given here, over the attribute `limits` of the environment, over
    `UNSAID`; all of one task set are built alike, so the first one speaks for all.
    """

    def __init__(
        self,
        build: Callable[[], Environment],
        limits: EnvironmentLimits | None = None,
        halted: Callable[[], bool] = bool,
    ):
        """`halted`: whether engines answer nobody any more, and a reset would lead to nothing; `bool()` is False."""
        self._build, self._given, self.halted = build, limits or EnvironmentLimits(), halted
        self.limits: EnvironmentLimits | None = None
        """Those that hold; None until the first environment is made."""
        self.calls, self.episodes = Places(None), Places(None)
        self.counts: Counter[str] = Counter()
        self.seconds = self.blocked = 0.0
        """Of all calls together; the longest that one of them blocked."""

    def __call__(self) -> GuardedEnvironment:
        """Raises what building raises, and HookError where the environment's `limits` are none."""
        try:
            environment = self._build()
        except Exception as error:
            self.counts["errors"] += not isinstance(error, MilesError)
            raise
        if self.limits is None:
            own = getattr(environment, "limits", EnvironmentLimits())
            if not isinstance(own, EnvironmentLimits):
                raise HookError(
                    f"{named(environment)}: its `limits` are {_shown(own)}; miles.api.EnvironmentLimits are expected"
                )
            self.limits = self._given.over(own).over(UNSAID)
            self.calls, self.episodes = Places(self.limits.calls), Places(self.limits.episodes)
        return GuardedEnvironment(environment, self, self.limits)

    def note_blocked(self, seconds: float) -> None:
        """That a call let nothing else happen for so long."""
        self.blocked = max(self.blocked, seconds)

    def metrics(self) -> Metrics:
        """Since the last time they were asked for: `COUNTS`; most calls and open environments at once; mean seconds of
        a call, and of waiting for its places; the longest that one kept the event loop to itself. Nothing where nothing
        was done."""
        counts, places = self.counts, (self.calls, self.episodes)
        if not counts:
            return {}
        calls = max(counts["calls"], 1)
        found: Metrics = {name: float(counts[name]) for name in COUNTS}
        found |= {"calls_max": float(self.calls.most), "episodes_max": float(self.episodes.most)}
        found |= {"call_time": self.seconds / calls, "wait_time": sum(p.waited for p in places) / calls}
        found["blocked_max"] = self.blocked
        self.counts, self.seconds, self.blocked = Counter(), 0.0, 0.0
        for kept in places:
            kept.most, kept.waited = kept.taken, 0.0
        return found


class GuardedEnvironment:
    """An environment as a generate function gets it. What is not of the protocol is the environment's own."""

    def __init__(self, environment: Any, home: Environments, limits: EnvironmentLimits):
        self.environment, self._home, self._limits = environment, home, limits
        self._open = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.environment, name)

    async def reset(self, prompt: Prompt) -> Observation:
        """Raises EnvironmentFault, RolloutHalted."""
        await self._enter()
        reset = partial(self.environment.reset, prompt)
        return await self._call("reset", reset, self._limits.reset_timeout, Observation)

    async def resume(self, state: Mapping[str, Any]) -> None:
        """In place of `reset`: `load_state_dict`. Raises EnvironmentFault."""
        await self._enter()
        with self.blamed("load_state_dict"):
            self.environment.load_state_dict(state)

    async def step(self, action: Action) -> StepResult:
        """Raises EnvironmentFault."""
        step = partial(self.environment.step, action)
        return await self._call("step", step, self._limits.step_timeout, StepResult)

    async def close(self) -> None:
        """Raises nothing: a fault while closing costs nobody a finished trajectory."""
        try:
            close = partial(watched, self.environment.close, self._home.note_blocked)
            await within(self._limits.close_timeout, close)
        except Exception as error:
            self._home.counts["close_errors"] += 1
            if self._home.counts["close_errors"] == 1:  # of many in a batch
                what = "took too long" if isinstance(error, TooLate) else f"raised {described(error)}"
                logger.warning("%s: closing %s", named(self.environment), what)
        finally:
            if self._open:
                self._open = False
                self._home.episodes.give_back()

    def fault(self, what: str, method: str = "", kind: str = "error", seconds: float = 0.0) -> EnvironmentFault:
        """To raise: it is counted."""
        self._home.counts[f"{kind}s"] += 1
        return EnvironmentFault(f"{named(self.environment)}: {what}", method, kind, seconds)

    @contextmanager
    def blamed(self, method: str) -> Iterator[None]:
        """Whatever is raised within is the environment's fault."""
        try:
            yield
        except Exception as error:
            raise self.fault(described(error), method) from error

    async def _enter(self) -> None:
        if not self._open:
            await self._home.episodes.take()
            self._open = True

    async def _call(
        self, method: str, call: Callable[[], Awaitable[Any]], timeout: float | None, kind: type[Answer]
    ) -> Answer:
        home = self._home
        await home.calls.take()
        if method == "reset" and home.halted():  # while it waited here, or for its place of the open ones
            home.calls.give_back()
            raise RolloutHalted
        home.counts["calls"] += 1
        started = time.perf_counter()
        try:
            answer = await within(timeout, partial(watched, call, home.note_blocked))
        except TooLate as late:
            what = f"`{method}` took longer than {timeout:g} s (environment_limits.{method}_timeout)"
            raise self.fault(what, method, "timeout", time.perf_counter() - started) from late
        except Exception as error:
            raise self.fault(described(error), method, seconds=time.perf_counter() - started) from error
        finally:
            home.seconds += time.perf_counter() - started
            home.calls.give_back()
        if problem := wrong_with(method, answer, kind):
            raise self.fault(problem, method)
        return answer


def guarded(environment: Any) -> GuardedEnvironment:
    """As it is, where `Environments` made it; otherwise under the limits it has of itself."""
    return environment if isinstance(environment, GuardedEnvironment) else Environments(lambda: environment)()


def named(environment: Any) -> str:
    """For messages: its class, and where that is defined."""
    return f"environment {type(environment).__qualname__}{defined_at(environment)}"


# ------------------------------------------------------------------------------------------------------------ time-outs


class TooLate(Exception):
    """A call did not end in its time; not a TimeoutError, which the call may raise itself."""


async def within(seconds: float | None, call: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """What a call returns, in a task of its own: one that does not heed its cancellation holds nobody up.

    Raises:
        TooLate: it had not ended after so many seconds.
    """
    task = asyncio.ensure_future(call())
    late = True
    try:
        await asyncio.wait({task}, timeout=seconds)
        late = not task.done()
    finally:
        if not task.done():  # too late, or whoever waited for it is being cancelled
            task.cancel()
            try:
                await asyncio.wait({task}, timeout=UNWINDING)
            finally:  # cancelled once more, perhaps
                _leave_behind(task)
    if late:
        raise TooLate
    if task.cancelled():
        raise RuntimeError("it was cancelled from within")
    return task.result()


async def watched(call: Callable[[], Awaitable[Answer]], note: Callable[[float], None]) -> Answer:
    """What a call returns; `note` is told each time how many seconds it kept the event loop to itself."""
    try:
        return await _delegated(call().__await__(), note)
    except SystemExit as error:  # it would end the run
        raise RuntimeError(repr(error)) from error


@types.coroutine
def _delegated(inner: Any, note: Callable[[float], None]) -> Generator[Any, Any, Any]:
    """`yield from inner`, with a clock beside it."""
    resume, value = inner.send, None
    while True:
        started = time.perf_counter()
        try:
            awaited = resume(value)
        except StopIteration as end:
            return end.value
        finally:
            note(time.perf_counter() - started)
        try:
            resume, value = inner.send, (yield awaited)
        except BaseException as error:  # a cancellation, mostly: it is for the call
            resume, value = inner.throw, error


def _leave_behind(task: asyncio.Task[Any]) -> None:
    """Let a cancelled task end when it likes. The end of the event loop does not wait for it either."""
    if not task.done():
        asyncio._unregister_task(task)
        _left_behind.add(task)  # the event loop holds its tasks by weak references only
    task.add_done_callback(_gone)


def _gone(task: asyncio.Future[Any]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()  # it was looked at: asyncio says nothing of it


# -------------------------------------------------------------------------------------------------------------- answers


def wrong_with(method: str, answer: Any, kind: type) -> str:
    """What is wrong with what an environment's `reset` or `step` returned, by the protocol; empty where nothing is."""
    if not isinstance(answer, kind):
        return f"`{method}` returned {_shown(answer)}; a miles.api.{kind.__name__} is expected"
    for field, singular in (("messages", "message with a role"), ("tools", "tool schema")):
        items = getattr(answer, field, ())
        sound = isinstance(items, list | tuple) and all(isinstance(item, Mapping) for item in items)
        if not sound or (field == "messages" and not all("role" in item for item in items)):
            return (
                f"`{method}` returned {kind.__name__}({field}={_shown(items)}); a tuple is expected, each item a "
                f"mapping: a {singular}"
            )
    info = getattr(answer, "info", {})
    if not isinstance(info, Mapping):
        return f"`{method}` returned {kind.__name__}(info={_shown(info)}); a mapping is expected"
    reward = getattr(answer, "reward", None)
    if reward is not None and not _is_finite(reward):
        return f"`{method}` returned reward={_shown(reward)}; a finite number or None is expected"
    return ""


def _is_finite(reward: Any) -> bool:
    try:
        return isinstance(reward, SupportsFloat) and math.isfinite(reward)
    except (TypeError, ValueError, OverflowError):  # an array of several, or more than a float holds
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
