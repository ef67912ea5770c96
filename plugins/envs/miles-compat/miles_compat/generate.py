"""The generate function `slime_function`: a function of slime or Miles turns a sample into a finished one."""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from miles.api import RESTARTED, ConfigError, GenerateContext, HookError, Sample, SamplingParams, Status, defined_at
from miles_compat import upstream
from miles_compat.calling import called, load_function, there
from miles_compat.conversion import ours, task_set_of, theirs
from miles_compat.current import current
from miles_compat.link import Link
from miles_compat.namespace import NAME, Args, args
from miles_compat.offered.inputs import GenerateFnInput, GenerateFnOutput
from miles_compat.offered.single_turn import GenerateState, generate
from miles_compat.plugin import GenerateOptions
from miles_compat.score import scalar
from miles_compat.server import HOST, server_for

Generate = Callable[[Args, upstream.Sample, dict[str, Any], bool], Awaitable[Any]]


class SlimeGenerate:
    """Calls the function in upstream's event loop, with upstream's `args`, and an engine at the other end of HTTP.

    A sample that was aborted goes on where `args.partial_rollout` is on; else the function begins again, as it does
    upstream. What the engine raises is raised here, whatever the function made of it.
    """

    def __init__(self, options: GenerateOptions):
        self.path = options.path or "single turn"
        function = checked_function(options.path)
        self._function = function() if inspect.isclass(function) else function
        self._call = signature_of(self._function)
        self._hooks = [(path, load_function(path)) for path in options.sample_hooks]

    async def __call__(self, context: GenerateContext, sample: Sample) -> Sample | list[Sample]:
        arguments, server = args(), await server_for(context)
        _complete(arguments, context, server.port, self._function)
        goes_on = sample.response_length > 0 and arguments.partial_rollout
        given = theirs(sample, fresh=not goes_on)
        link = Link(sample, context, copy.deepcopy(given.prompt))
        if goes_on:
            link.remember(sample)
            given.status = upstream.Status.ABORTED
        work = self._work(link, arguments, given, sampling_params(context.sampling), context.evaluation)
        with server.serving(link):
            try:
                made = await there(work)
            except Exception as error:
                if link.failure is not None:
                    raise link.failure from error
                raise
        if link.failure is not None:
            raise link.failure
        if isinstance(made, list):
            return [self._finished(link, one, listed=True) for one in made]
        return self._finished(link, made, listed=False)

    async def _work(
        self, link: Link, arguments: Args, given: upstream.Sample, params: dict[str, Any], evaluation: bool
    ) -> upstream.Sample | list[upstream.Sample]:
        """In upstream's loop: what the function makes, hooks included."""
        link.enter()
        made = await self._call(arguments, given, params, evaluation)
        made = made.samples if isinstance(made, GenerateFnOutput) else made
        if isinstance(made, list):
            return [await self._hooked(arguments, self._checked(one), evaluation) for one in made]
        return await self._hooked(arguments, self._checked(made), evaluation)

    def _checked(self, made: Any) -> upstream.Sample:
        """Raises HookError for what is no sample."""
        if isinstance(made, upstream.Sample):
            return made
        where = defined_at(self._function)
        raise HookError(f"{self.path}{where} returned {type(made).__name__}; a Sample or a list of Samples is expected")

    async def _hooked(self, arguments: Args, made: upstream.Sample, evaluation: bool) -> upstream.Sample:
        """slime's sample hooks, in their order; None leaves the sample."""
        told = {"rollout_id": current.step, "evaluation": evaluation}
        for path, hook in self._hooks:
            result = await called(hook, arguments, made, **_taken(hook, told))
            if result is not None and not isinstance(result, upstream.Sample):
                raise HookError(f"--rollout-sample-hook-path {path} returned {type(result).__name__}; Sample or None")
            made = made if result is None else result
        return made

    def _finished(self, link: Link, made: upstream.Sample, *, listed: bool) -> Sample:
        if made.status is upstream.Status.ABORTED and not args().partial_rollout:
            return begun_again(link)
        sample = ours(link, made, listed=listed)
        if made.reward is not None and sample.status in (Status.COMPLETED, Status.TRUNCATED) and not _judged(sample):
            sample.reward, sample.reward_parts = scalar(made.reward, args().reward_key or "", NAME)
        return sample


def begun_again(link: Link) -> Sample:
    """The sample from its prompt, for a function that does not go on with what was aborted. What was said is lost."""
    asked = link.sample
    fresh = Sample.begin(asked.prompt, id=asked.id, group_id=asked.group_id, seed=asked.seed)
    fresh.metadata = dict(asked.metadata)
    if any(len(one.tokens) for one in link.said):
        fresh.metadata[RESTARTED] = fresh.metadata.get(RESTARTED, 0) + 1
    fresh.status = Status.ABORTED
    return fresh


def checked_function(path: str) -> Any:
    """The function that a path names, or the class of one; upstream's own single turn without a path. Errors as in
    `load_function` and `signature_of`."""
    function = load_function(path) if path else generate
    if not inspect.isclass(function):
        signature_of(function)
    return function


def signature_of(function: Any) -> Generate:
    """How a function is called: `(args, sample, sampling_params[, evaluation])`, as in slime and Miles, or with one
    `GenerateFnInput`, as in Miles.

    Raises:
        ConfigError: it cannot be called like either.
    """
    parameters = inspect.signature(function).parameters
    by_place = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_place) >= 3 and by_place[0].name != "input":
        return partial(_call_with_three, function, "evaluation" in parameters)
    if len([p for p in by_place if p.default is p.empty]) == 1:
        return partial(_call_with_input, function)
    raise ConfigError(
        f"--custom-generate-function-path: {getattr(function, '__name__', function)}{defined_at(function)} takes "
        f"({', '.join(parameters)}); (args, sample, sampling_params) is expected, or one GenerateFnInput"
    )


async def _call_with_three(
    function: Any, takes_evaluation: bool, arguments: Args, sample: upstream.Sample, params: dict, evaluation: bool
) -> Any:
    more = {"evaluation": evaluation} if takes_evaluation else {}
    return await called(function, arguments, sample, params, **more)


async def _call_with_input(
    function: Any, arguments: Args, sample: upstream.Sample, params: dict, evaluation: bool
) -> Any:
    return await called(function, GenerateFnInput(GenerateState(arguments), sample, params, evaluation))


def sampling_params(sampling: SamplingParams) -> dict[str, Any]:
    """As upstream hands them on, for SGLang; what is not at its neutral value is added."""
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    further = {"min_p": sampling.min_p, "min_new_tokens": sampling.min_new_tokens}
    return params | {name: value for name, value in further.items() if value}


def _complete(arguments: Args, context: GenerateContext, port: int, function: Any) -> None:
    """What is known of a run only now."""
    arguments.sglang_router_ip, arguments.sglang_router_port = HOST, port
    if context.max_context_tokens is not None:
        arguments.rollout_max_context_len = context.max_context_tokens
    if context.routed_experts:
        arguments.use_rollout_routing_replay = True
    if hasattr(function, "add_arguments") and "add_arguments" not in current.facts:
        current.facts["add_arguments"] = True
        for name, value in _own_defaults(function).items():
            if name not in vars(arguments):
                setattr(arguments, name, value)


def _own_defaults(function: Any) -> dict[str, Any]:
    """Defaults of the flags that a function of Miles adds."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    function.add_arguments(parser)
    return {action.dest: action.default for action in parser._actions if action.default is not argparse.SUPPRESS}


def _taken(function: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that a function has parameters for."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return keywords
    return {name: value for name, value in keywords.items() if name in {p.name for p in parameters}}


def _judged(sample: Sample) -> bool:
    """Whether the reward `slime_function` stands in its task set, and says what the function has said."""
    task_set = task_set_of(sample.prompt)
    return task_set is not None and any(spec.name.rpartition("/")[2] == NAME for spec in task_set.reward)
