"""Is this object what its kind's protocol asks for? Clear answers before a run, instead of odd failures within it."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from miles.errors import HookError
from miles.kinds import Kind
from miles.protocols import GroupReward, Reward
from miles.targets import defined_at

_AWAITABLE = (Awaitable, Coroutine)


def options_type(thing: Any) -> type | None:
    """The type of a target's parameter `options`, for targets that no `Component` describes."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    if not callable(function):
        return None
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (TypeError, NameError, ValueError):
        return None
    hint = hints.get("options") if "options" in parameters else None
    return (
        hint
        if inspect.isclass(hint) and (hasattr(hint, "model_fields") or hasattr(hint, "__dataclass_fields__"))
        else None
    )


def construct(thing: Any, options: Any, context: Any, who: str, kind: Kind) -> Any:
    """Call a target as `miles.protocols` says: `Target(options)`, `Target()`, or a function with `options` bound.

    Raises:
        HookError: the target cannot be called that way.
    """
    extra = {} if context is None else {"context": context}
    if inspect.isclass(thing):
        arguments = () if options is None else (options,)
        _check_binds(thing, arguments, extra, f"{who}: {thing.__qualname__}")
        return thing(*arguments, **extra)
    if not inspect.isroutine(thing) and not isinstance(thing, functools.partial):
        return thing
    bound = extra if options is None else {"options": options, **extra}
    if not bound:
        return thing
    unknown = bound.keys() - inspect.signature(thing).parameters.keys()
    if unknown and not _takes_keywords(thing):
        raise HookError(f"{who}: {_name(thing)} has no parameter {sorted(unknown)[0]!r}, which it is called with")
    return functools.partial(thing, **bound)


def check_result(built: Any, kind: Kind, who: str) -> None:
    """Compare an object with its kind's protocol.

    Raises:
        HookError: naming every method that is missing, or has other arguments, or is not async where it must be.
    """
    if kind.protocol is None:
        return
    problems = _reward_problems(built) if kind.protocol is Reward else _problems(built, kind.protocol)
    if problems:
        lack = "cannot judge" if kind.protocol is Reward else f"is not a miles.protocols.{kind.protocol.__name__}"
        raise HookError(f"{who}{defined_at(built)} {lack}: " + "; ".join(problems))


def judgement(reward: Any) -> tuple[str, Any]:
    """How a reward judges: by `score_group` where it has one, else by `score`, else `it` is a function of a sample."""
    for name in ("score_group", "score"):
        if hasattr(reward, name):
            return name, getattr(reward, name)
    return "it", reward


def _reward_problems(built: Any) -> list[str]:
    name, method = judgement(built)
    if not callable(method):
        return ["it has neither `score(sample)` nor `score_group(group)` and is no function `(sample) -> float`"]
    wanted = GroupReward.score_group if name == "score_group" else Reward.score
    if not _arity(method, wanted, name):
        return []
    right = "(group) -> list of floats" if name == "score_group" else "(sample) -> float"
    called, label = right.partition(" ->")[0], name if name == "it" else f"`{name}`"
    problem = f"{label} is called with {called}, but is {_name(method)}{_signature(method)}; write `{right}`"
    if list(inspect.signature(method).parameters)[:2] == ["args", "sample"]:
        problem += "; `(args, sample, **kwargs)` is the form of slime, where rewards get the arguments of the run too"
    return [problem]


def _problems(built: Any, protocol: type) -> list[str]:
    methods, attributes = _members(protocol)
    problems = [f"attribute `{name}` is missing" for name in attributes if not hasattr(built, name)]
    for name, wanted in methods.items():
        found = built if name == "__call__" and callable(built) else getattr(built, name, None)
        if found is None:
            problems.append("it cannot be called" if name == "__call__" else f"method `{name}` is missing")
        elif not callable(found):
            problems.append(f"`{name}` is not a method")
        else:
            label = "it" if name == "__call__" else name
            problems += _arity(found, wanted, label) or _asynchrony(found, wanted, label)
    return problems


def _members(protocol: type) -> tuple[dict[str, Callable], list[str]]:
    methods: dict[str, Callable] = {
        name: member
        for name, member in vars(protocol).items()
        if inspect.isfunction(member)
        and (not name.startswith("_") or name in ("__call__", "__len__"))
        and member.__module__ == protocol.__module__
    }
    properties = [name for name, member in vars(protocol).items() if isinstance(member, property)]
    annotated = [name for name in vars(protocol).get("__annotations__", {}) if not name.startswith("_")]
    return methods, [*annotated, *properties]


def _arity(found: Callable, wanted: Callable, label: str) -> list[str]:
    """Can `found` be called with the positional arguments that the protocol's method gets?"""
    parameters = list(inspect.signature(wanted).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return []
    try:
        inspect.signature(found).bind(*[None] * len(names))
    except TypeError as error:
        called = label if label == "it" else f"`{label}`"
        return [f"{called} is called with ({', '.join(names)}), but is {_name(found)}{_signature(found)}: {error}"]
    except ValueError:
        return []
    return []


def _asynchrony(found: Callable, wanted: Callable, label: str) -> list[str]:
    function: Any = found
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isfunction(function) and not inspect.ismethod(function):
        function = type(function).__call__
    if not inspect.isroutine(function) or hasattr(function, "__wrapped__"):
        return []
    is_async = inspect.iscoroutinefunction(function) or _returns_awaitable(function)
    if inspect.iscoroutinefunction(wanted) and not is_async:
        return [f"`{label}` must be `async def`"]
    if not inspect.iscoroutinefunction(wanted) and inspect.iscoroutinefunction(function):
        return [f"`{label}` must not be `async def`"]
    return []


def _returns_awaitable(function: Callable) -> bool:
    try:
        result = typing.get_type_hints(function).get("return")
    except (NameError, TypeError):
        return False
    return (typing.get_origin(result) or result) in _AWAITABLE


def _check_binds(thing: Any, arguments: tuple, keywords: dict[str, Any], who: str) -> None:
    try:
        inspect.signature(thing).bind(*arguments, **keywords)
    except TypeError as error:
        given = ", ".join([*("options" for _ in arguments), *(f"{name}={name}" for name in keywords)])
        raise HookError(
            f"{who} is built as Target({given}), but its signature is {_signature(thing)}: {error}"
        ) from error
    except ValueError:
        return


def _takes_keywords(thing: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(thing).parameters.values())


def _signature(thing: Any) -> str:
    return str(inspect.signature(thing))


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", type(thing).__name__)
