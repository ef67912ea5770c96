"""Executors that are wrong in one way each, beside the test of the contract that catches them."""

import asyncio
from functools import partial

import pytest

from miles.api import ExecutorContext, Seats, WorkerError
from miles.builtins.inprocess import InProcessExecutor
from miles.builtins.local import LocalExecutor
from miles.testing import ExecutorContract
from miles.toolkit import DirectLink, Failure, ProcessLink, WorkerFailure, WorkerHost, Workers
from miles.workers import process

CONTEXT = ExecutorContext({f"workers-{size}": Seats(size) for size in (1, 2)})
WRONG = []


class Hosts:
    """Any number of ranks, all in this process."""

    shares_process = True
    group, host = Workers, WorkerHost

    async def launch(self, name, target, *args, **kwargs):
        size = int(name.rpartition("-")[2])  # the contract names its groups so
        links = [DirectLink(self.host(rank, size)) for rank in range(size)]
        return await Workers.build(self.group(name, links, address="127.0.0.1", timeout=None), target, args, kwargs)

    async def close(self):
        pass


def executor_with(part, method, function):
    """`Hosts` with another method: of its own (`executor`), of its hosts (`host`), of its groups (`group`)."""
    if part == "executor":
        return type("WrongExecutor", (Hosts,), {method: function})
    base = getattr(Hosts, part)
    return type("WrongExecutor", (Hosts,), {part: type(f"Wrong{base.__name__}", (base,), {method: function})})


def local_with(method, function):
    """The members of a contract whose executor is `local` with another method."""
    wrong = type("WrongLocal", (LocalExecutor,), {method: function})
    return {"build": lambda self: wrong(context=self.context()), "sizes": (1,), "patience": 1.5}


def caught_by(test, part, method, **members):
    """An executor that has the function below as `method` of `part`, or of the executor `local`, fails this test."""

    def add(function):
        if part == "local":
            wrong = None, local_with(method, function)
        else:
            wrong = executor_with(part, method, function), members
        WRONG.append(pytest.param(test, *wrong, id=getattr(function, "__name__", method)))
        return function

    return add


def test_right_executors_pass(passes):
    passes(ExecutorContract, Hosts)
    passes(ExecutorContract, partial(InProcessExecutor, context=CONTEXT), sizes=(1,))


# ------------------------------------------------------------------------------------------------------------- answers


@caught_by("test_every_rank_answers_in_order", "group", "call")
async def backwards(self, *args, **kwargs):
    return (await Workers.call(self, *args, **kwargs))[::-1]


@caught_by("test_each_rank_gets_its_own_arguments", "group", "call_each")
async def the_same_for_all(self, method, args):
    return await Workers.call(self, method, *args[0])


@caught_by("test_one_rank_is_called_alone", "group", "call_one")
async def everybody(self, rank, *args, **kwargs):
    return (await self.call(*args, **kwargs))[rank]


@caught_by("test_one_rank_is_called_alone", "group", "call_one")
async def the_first(self, rank, *args, **kwargs):
    return await Workers.call_one(self, 0, *args, **kwargs)


@caught_by("test_arrays_and_nested_data_cross_unchanged", "group", "call")
async def by_json(self, *args, **kwargs):
    return [str(value) for value in await Workers.call(self, *args, **kwargs)]


@caught_by("test_it_says_whether_it_shares_the_process", "group", "call")
async def copying(self, *args, **kwargs):
    return [type(value)() for value in await Workers.call(self, *args, **kwargs)]


# ------------------------------------------------------------------------------------------------- order and patience


@caught_by("test_calls_to_a_rank_follow_one_another", "host", "call")
async def at_once(self, key, method, args, kwargs):
    found = await asyncio.to_thread(getattr(self.objects[key], method), *args, **kwargs)
    return await found if asyncio.iscoroutine(found) else found


@caught_by("test_the_event_loop_is_not_blocked", "host", "call")
async def blocking(self, key, method, args, kwargs):
    found = getattr(self.objects[key], method)(*args, **kwargs)
    return await found if asyncio.iscoroutine(found) else found


@caught_by("test_coroutine_methods_run_beside_all_others", "host", "call", patience=1.0)
async def one_by_one(self, key, method, args, kwargs):
    async with self.__dict__.setdefault("turn", asyncio.Lock()):
        return await WorkerHost.call(self, key, method, args, kwargs)


@caught_by("test_coroutine_methods_run_beside_all_others", "host", "call", patience=1.0)
async def coroutines_in_turn(self, key, method, args, kwargs):
    if asyncio.iscoroutinefunction(getattr(self.objects[key], method)):
        return await one_by_one(self, key, method, args, kwargs)
    return await WorkerHost.call(self, key, method, args, kwargs)


@caught_by("test_a_call_that_is_given_up_leaves_the_group_as_it_is", "group", "call")
async def touchy(self, *args, **kwargs):
    if getattr(self, "spoilt", False):
        raise WorkerError("the answer is somebody else's")
    try:
        return await Workers.call(self, *args, **kwargs)
    except asyncio.CancelledError:
        self.spoilt = True
        raise


# ------------------------------------------------------------------------------------------------ where workers live


@caught_by("test_another_object_lives_beside", "group", "beside")
async def the_same_object(self, name, target, *args, **kwargs):
    return self


@caught_by("test_another_object_lives_beside", "group", "beside")
async def in_its_place(self, name, target, *args, **kwargs):
    return await Workers.build(self, target, args, kwargs)


@caught_by("test_workers_reach_the_driver", "group", "__init__")
def unreachable(self, *args, **kwargs):
    Workers.__init__(self, *args, **{**kwargs, "address": "::1"})


caught_by("test_ranks_find_each_other", "executor", "shares_process")(False)


# ------------------------------------------------------------------------------------------------------------ failures


@caught_by("test_a_failure_says_what_and_where", "group", "call")
async def silent(self, *args, **kwargs):
    try:
        return await Workers.call(self, *args, **kwargs)
    except ZeroDivisionError:
        return [None] * self.size


@caught_by("test_a_failure_says_what_and_where", "group", "call")
async def terse(self, *args, **kwargs):
    try:
        return await Workers.call(self, *args, **kwargs)
    except Exception:
        raise WorkerError("a worker failed") from None


@caught_by("test_a_failure_says_what_and_where", "group", "call")
async def fragile(self, *args, **kwargs):
    self.fate = getattr(self, "fate", None)
    if self.fate:
        raise self.fate
    try:
        return await Workers.call(self, *args, **kwargs)
    except Exception as error:
        self.fate = error
        raise


@caught_by("test_a_worker_that_cannot_be_built_is_an_error", "executor", "launch")
async def lazily(self, name, target, *args, **kwargs):
    try:
        return await Hosts.launch(self, name, target, *args, **kwargs)
    except ValueError:
        return Workers(name, [], address="", timeout=None)


@caught_by("test_a_worker_that_dies_is_an_error", "local", "launch")
async def unburied(self, *args, **kwargs):
    group = await LocalExecutor.launch(self, *args, **kwargs)
    for link in group.links:
        link._bury = asyncio.Event().wait
    return group


@caught_by("test_a_worker_that_dies_is_an_error", "local", "launch")
async def forgetful(self, *args, **kwargs):
    group = await LocalExecutor.launch(self, *args, **kwargs)
    group._first_cause = lambda method, errors, silent: WorkerError("rank 0 died")
    for link in group.links:
        link.request = unless_dead(link)
    return group


def unless_dead(link):
    async def request(*args):
        try:
            return await ProcessLink.request(link, *args)
        except WorkerFailure:
            if "die" in args:
                raise

    return request


@caught_by("test_a_worker_that_hangs_is_an_error", "local", "launch")
async def patient(self, *args, **kwargs):
    group = await LocalExecutor.launch(self, *args, **kwargs)
    group.timeout = None
    return group


@caught_by("test_a_worker_that_hangs_is_an_error", "local", "launch")
async def curt(self, *args, **kwargs):
    group = await LocalExecutor.launch(self, *args, **kwargs)
    group._whereabouts = lambda rank, why: asyncio.sleep(0, Failure(rank, "silent", why))
    return group


@caught_by("test_a_worker_that_hangs_is_an_error", "local", "launch")
async def merciful(self, *args, **kwargs):
    group = await LocalExecutor.launch(self, *args, **kwargs)
    for link in group.links:
        link.kill = lambda: None
    return group


@caught_by("test_closing", "group", "close")
async def once(self):
    del self.links


@caught_by("test_closing", "local", "launch")
async def unclosed(self, *args, **kwargs):
    group = await LocalExecutor.launch(self, *args, **kwargs)
    group.close = partial(asyncio.sleep, 0)
    return group


WRONG.append(pytest.param("test_a_size_it_does_not_serve_is_refused", Hosts, {"sizes": (1,)}, id="boastful"))


@pytest.mark.parametrize(("test", "executor", "members"), WRONG)
def test_wrong_executors_are_caught(test, executor, members, catches, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE", 0.2)
    catches(ExecutorContract, {test: [(executor, members)]}, others=True)


def test_every_test_catches_something(catches):
    catches(ExecutorContract, {case.values[0]: [] for case in WRONG})
