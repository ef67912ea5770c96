"""Generate function `agent`: a function of the user's, which speaks to the model over OpenAI's chat API."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, SupportsFloat

from miles_serve.chat import ChatLayer
from miles_serve.vocabulary import Vocabulary

from miles.api import (
    RESTARTED,
    ConfigError,
    EngineLostError,
    GenerateContext,
    Sample,
    SamplingParams,
    Status,
    defined_at,
    described,
    import_target,
    in_thread,
)
from miles_gateway.options import AgentOptions
from miles_gateway.server import gateway_at
from miles_gateway.session import Session
from miles_gateway.tree import Place

logger = logging.getLogger("miles")
ARGUMENTS = ("base_url", "prompt", "request_kwargs", "metadata")
MORE = ("tools", "label", "api_key", "sample_id", "evaluation")
"""For those who ask for them."""
KEPT_PROMPTS = 1024
NO_KEY = "none"
"""What clients may send as their key where none is asked for."""


class Overtime(Exception):
    """What becomes of an agent that the option `timeout` ends."""


class Agent:
    """Runs the agent once for each sample, in a session of its own, and makes samples of what the model said in it."""

    def __init__(self, options: AgentOptions):
        self.options = options
        self.function = import_target(options.target, "agent")
        self.name = f"agent {options.function}{defined_at(self.function)}"
        self.takes = _takes(self.function, self.name)
        self.api_key = _key(options)
        self._places = asyncio.Semaphore(options.threads)
        self._vocabulary: tuple[Any, Vocabulary] | None = None
        self._rendered: OrderedDict[bytes, list[int]] = OrderedDict()
        self._told: set[str] = set()

    async def __call__(self, context: GenerateContext, sample: Sample) -> Sample | list[Sample]:
        options = self.options
        gateway = await gateway_at(options.host, options.port, self.api_key)
        strict = options.other_sampling == "refuse"
        if sample.turns:  # it was aborted, and nobody can put its agent back to where it was
            sample = sample.beginning(sample.prompt_length)
            sample.metadata[RESTARTED] = sample.metadata.get(RESTARTED, 0) + 1
        session = Session(context, sample, self._pieces(context), self._render, strict)
        answer, error = None, None
        async with gateway.session(session, options.address) as base_url:
            try:
                async with asyncio.timeout(options.timeout) as limit, _until_stopped(session):
                    answer = await self._run(self._arguments(base_url, context, sample))
            except Exception as raised:
                error = raised
        if limit.expired():
            error = Overtime(f"it took longer than timeout={options.timeout} seconds")
        self._warn(session)
        return self._aborted(session) if session.stopped else self._finished(session, answer, error)

    # ------------------------------------------------------------------------------------------------ calling the agent

    def _arguments(self, base_url: str, context: GenerateContext, sample: Sample) -> dict[str, Any]:
        """Copies, which an agent may change."""
        prompt = sample.prompt
        given = {
            "base_url": base_url,
            "prompt": prompt.text if prompt.messages is None else prompt.messages,
            "request_kwargs": request_kwargs(context.sampling),
            "metadata": prompt.metadata,
            "tools": prompt.tools,
            "label": prompt.label,
            "api_key": self.api_key or NO_KEY,
            "sample_id": sample.id,
            "evaluation": context.evaluation,
        }
        return copy.deepcopy({name: value for name, value in given.items() if name in self.takes})

    async def _run(self, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__):
            return await self.function(**arguments)
        async with self._places:
            answer = await in_thread(self.function, **arguments)
        return await answer if inspect.isawaitable(answer) else answer

    # ------------------------------------------------------------------------------------------------ rendering

    def _pieces(self, context: GenerateContext) -> Vocabulary:
        chat: Any = context.chat
        if self._vocabulary is None or self._vocabulary[0] is not chat:
            if not hasattr(chat, "tokenizer"):
                raise ConfigError(
                    f"agent: chat format {type(chat).__qualname__}{defined_at(chat)} has no attribute `tokenizer`, "
                    "which tells the text of tokens"
                )
            self._vocabulary = chat, Vocabulary(chat.tokenizer)
            self._rendered.clear()
        return self._vocabulary[1]

    def _render(self, layer: ChatLayer, place: Place, tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """A conversation in which the model has not spoken. The samples of a prompt mostly begin with the same one."""
        if any(message["role"] == "assistant" for message in place.rest):
            return layer.prompt(place.rest, tools)
        tokens = self._rendered.get(place.state)
        if tokens is None:
            tokens = self._rendered[place.state] = layer.prompt(place.rest, tools)
            if len(self._rendered) > KEPT_PROMPTS:
                self._rendered.popitem(last=False)
        return list(tokens)

    # ------------------------------------------------------------------------------------------------ what came of it

    def _finished(self, session: Session, answer: Any, error: Exception | None) -> Sample | list[Sample]:
        """Samples with their rewards; a failed one alone, with what the model said last."""
        if isinstance(session.lost, EngineLostError) or (error and session.lost):
            assert session.lost is not None
            raise session.lost from error
        samples = session.samples()
        if isinstance(error, Overtime):
            return self._failed(session, str(error))
        if error is not None and not (session.cut_off and samples):
            return self._failed(session, described(error))
        if not samples:
            why = "no request" if not session.requests else f"no request that was answered: {session.problem}"
            return self._failed(session, f"it made {why}")
        if answer is not None and not isinstance(answer, Mapping):
            return self._failed(session, f"it returned {answer!r:.80}; a dict with `reward`, or None, is expected")
        told = dict(answer or {})
        reward = told.pop("reward", None)
        if reward is not None and not (isinstance(reward, SupportsFloat) and math.isfinite(reward)):
            return self._failed(session, f"it returned reward={reward!r:.80}; a finite number or None is expected")
        try:
            metadata = [copy.deepcopy(told) for _ in samples]
        except Exception as fault:
            return self._failed(session, f"it returned metadata that cannot be copied: {fault}")
        for sample, its in zip(samples, metadata, strict=True):
            sample.metadata.update(its)
            sample.error = None if error is None else f"{self.name}: {described(error)}"
            if reward is not None:
                sample.reward, sample.reward_parts["agent"] = float(reward), float(reward)
        return samples if len(samples) > 1 else samples[0]

    def _aborted(self, session: Session) -> Sample:
        sample = session.sample if session.last is None else session.last.sample
        sample.status = Status.ABORTED
        return sample

    def _failed(self, session: Session, why: str) -> Sample:
        sample = session.sample if session.last is None else session.last.sample
        sample.status, sample.error = Status.FAILED, f"{self.name}: {why}"
        return sample

    def _warn(self, session: Session) -> None:
        """Once of everything that requests asked for and were not given."""
        if new := session.ignored - self._told:
            self._told |= new
            logger.warning(
                "%s asks for %s of its own; the task set's counts. Give requests the `request_kwargs` that the agent "
                "is called with, or say other_sampling: refuse",
                self.name,
                ", ".join(sorted(new)),
            )


@asynccontextmanager
async def _until_stopped(session: Session) -> AsyncIterator[None]:
    """Ends early when the session is stopped, without an error."""
    task = asyncio.current_task()
    assert task is not None
    try:
        yield
    except BaseException as error:
        if not session.stopped or task.uncancel() > 0 or not isinstance(error, asyncio.CancelledError):
            raise
    else:
        if session.stopped:  # the agent ended all the same
            task.uncancel()


def request_kwargs(sampling: SamplingParams) -> dict[str, Any]:
    """The task set's sampling as the keywords of `chat.completions.create`."""
    kwargs: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    }
    return kwargs | ({"stop": list(sampling.stop)} if sampling.stop else {})


def _takes(function: Any, name: str) -> frozenset[str]:
    """Names of the arguments that a function is called with.

    Raises:
        ConfigError: it cannot be called as an agent is.
    """
    form = f"write ({', '.join(ARGUMENTS)}, **kw)"
    if not callable(function):
        raise ConfigError(f"{name}: it cannot be called; an agent is a function: {form}")
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names.update(ARGUMENTS, MORE)
    if missing := [argument for argument in ARGUMENTS if argument not in names]:
        raise ConfigError(f"{name}: it has no parameter {missing[0]!r}; {form}")
    taken = names & {*ARGUMENTS, *MORE}
    try:
        signature.bind(**dict.fromkeys(taken))
    except TypeError as error:
        raise ConfigError(f"{name}: called with {', '.join(sorted(taken))}, it is {error}; {form}") from error
    return frozenset(taken)


def _key(options: AgentOptions) -> str | None:
    variable = options.api_key_variable
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(f"agent: the environment variable {variable} is not set; it holds the key of the server")
    return os.environ[variable]
