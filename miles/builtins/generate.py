"""Generate functions: one turn, turns with an environment, or the response that the data holds (SFT).

Token in, token out: what the model produced goes into the stream as it is, with loss mask 1, its log-probabilities and
the version of the weights; what others said is rendered once by the chat format, with loss mask 0. A sample that was
aborted goes on from the tokens it has: its last turn is the one that is not finished.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, SupportsFloat, TypeVar

import numpy as np

from miles.api import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    ROUTED_EXPERTS,
    WEIGHT_VERSION,
    Action,
    ConfigError,
    DataError,
    EngineError,
    Environment,
    GenerateContext,
    GenerateRequest,
    GenerateResult,
    Message,
    Observation,
    Sample,
    Status,
    StepResult,
    Turn,
    defined_at,
    described,
    experts_column,
    recorded_experts,
)

ENVIRONMENT_STATE = "environment_state"
"""Key of `Sample.metadata` under which a half-finished trajectory keeps its environment's state."""
RESTARTED = "restarted"
"""Key of `Sample.metadata`: how often a half-finished trajectory had to begin again."""
KEPT_PROMPTS = 1024
STATUS_OF = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}

logger = logging.getLogger("miles")
Answer = TypeVar("Answer", Observation, StepResult)


async def single_turn(context: GenerateContext, sample: Sample) -> Sample:
    """One response to the prompt."""
    sample.status = STATUS_OF[await take_turn(context, sample)]
    sample.text = context.chat.decode(sample.tokens[sample.prompt_length :])
    if sample.messages and sample.status is not Status.ABORTED:
        sample.messages.append({"role": "assistant", "content": sample.text})
    return sample


async def take_turn(context: GenerateContext, sample: Sample) -> str:
    """Let the model speak once, or go on with a turn that was aborted.

    Appends tokens and a `Turn` to the sample.

    Returns:
        The turn's finish reason; `length` when there was no room for a single token.

    Raises:
        DataError: the prompt is empty.
    """
    if not sample.tokens:
        raise DataError(
            f"prompt {sample.prompt.id} has no tokens to continue (its conversation ends with the assistant, or only "
            "its environment says what is asked). Use generate: dataset to train on it, or multi_turn with an "
            "environment"
        )
    last = sample.turns[-1] if sample.turns else None
    if last is None or last.finish_reason != "abort":
        last = Turn(len(sample.tokens), len(sample.tokens), "length")
        sample.turns.append(last)
    turn, sampling, said = last, context.sampling, last.end - last.start
    room = sampling.max_new_tokens - said
    if context.max_context_tokens is not None:
        room = min(room, context.max_context_tokens - len(sample.tokens))
    if room <= 0:
        turn.finish_reason = "length"
        return "length"
    if said or room < sampling.max_new_tokens:
        least = min(max(sampling.min_new_tokens - said, 0), room)
        sampling = replace(sampling, max_new_tokens=room, min_new_tokens=least)
    request = GenerateRequest(
        id=f"{sample.id}.{len(sample.turns)}",
        tokens=list(sample.tokens),
        sampling=sampling,
        seed=sample.seed,
        routed_experts=context.routed_experts,
        routed_experts_from=recorded_rows(sample) if context.routed_experts else 0,
        multimodal=sample.multimodal,
        priority=1 if context.evaluation else 0,
    )
    started = time.perf_counter()
    result = await context.generate(request)
    record(sample, request, result)
    turn.seconds += time.perf_counter() - started
    turn.end, turn.finish_reason = len(sample.tokens), result.finish_reason
    return result.finish_reason


def record(sample: Sample, request: GenerateRequest, result: GenerateResult) -> None:
    """Append what the model produced, with its per-token columns, to the stream that was its request.

    Raises:
        EngineError: expert choices were asked for, and are not there or do not go with the tokens.
    """
    sample.append(
        result.tokens,
        {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: result.log_probs, WEIGHT_VERSION: result.weight_versions},
    )
    if result.routed_experts is not None:
        record_experts(sample, request, result, result.routed_experts)
    elif request.routed_experts and result.finish_reason != "abort":
        raise EngineError(
            f"request {request.id!r} asked for expert choices and was answered without: is the engine's model a "
            "mixture of experts, and does its server return them (SGLang: --enable-return-routed-experts)?"
        )


def recorded_rows(sample: Sample) -> int:
    """How many expert choices a sample has, up to the last one that was recorded."""
    rows = sample.columns.get(ROUTED_EXPERTS)
    looked_at = 256  # it is near the end, mostly: what the environment said since has no choices yet
    while rows is not None and len(rows):
        start = max(len(rows) - looked_at, 0)
        known = np.flatnonzero(recorded_experts(rows[start:]))
        if len(known):
            return start + int(known[-1]) + 1
        rows, looked_at = rows[:start], 4 * looked_at
    return 0


def record_experts(sample: Sample, request: GenerateRequest, result: GenerateResult, rows: np.ndarray) -> None:
    """Write the expert choices that the sample does not have yet. A row stays that of the first pass that told it.

    Rows that an earlier request lost were computed again by this one. They are taken, unless the token that was drawn
    from them is of other weights than these.
    """
    start, first = request.routed_experts_from, len(sample.tokens) - 1 - len(rows)
    if not 0 <= first <= start:
        wanted = len(sample.tokens) - 1 - start
        raise EngineError(f"request {request.id!r} wants {wanted} rows of expert choices and was given {len(rows)}")
    column, rows = experts_column(rows), rows[start - first :]
    drawn_by = sample.columns[WEIGHT_VERSION.name][start + 1 : len(request.tokens)]
    lost = (drawn_by != WEIGHT_VERSION.fill) & (drawn_by != next(iter(result.weight_versions), None))
    if lost.any():
        rows = rows.copy()
        rows[: len(lost)][lost] = column.fill
    sample.write(column, start, rows)


def begin_again(sample: Sample, tokens: Sequence[int]) -> None:
    """Make `tokens` the prompt of a sample that has said nothing worth keeping."""
    sample.tokens, sample.columns, sample.specs, sample.turns = [], {}, {}, []
    sample.prompt_length = len(tokens)
    sample.declare(LOSS_MASK)
    sample.append(tokens)


# --------------------------------------------------------------------------------------------------------- multi-turn


class EnvironmentFault(Exception):
    """What is wrong with an environment: what its own code raised, or returned in place of what is expected."""


class MultiTurn:
    """Model and environment take turns until the environment is done, or a limit is reached.

    The environment's first observation is the prompt; one that gives no messages leaves the prompt of the data. Each
    turn is parsed and handed over whole, with all the tool calls it makes. `TRUNCATED` means that a turn hit its length
    limit (the environment has seen it), that the context is full, or that `max_turns` were taken. What the environment
    raises, or returns of a wrong type, makes the sample `FAILED`, with an error that names its class. An aborted sample
    keeps its environment's `state_dict` and goes on from it; if the environment has none, it begins again and counts
    that in its metadata.
    """

    def __init__(self) -> None:
        self._rendered: OrderedDict[str, tuple[Observation, list[int]]] = OrderedDict()

    async def __call__(self, context: GenerateContext, sample: Sample) -> Sample:
        if context.make_environment is None:
            raise ConfigError(f"task set {sample.prompt.task_set!r}: generate: multi_turn needs an environment")
        environment = context.make_environment()
        try:
            await self._enter(context, sample, environment)
            sample.status = await self._converse(context, sample, environment)
        except EnvironmentFault as fault:
            who = f"environment {type(environment).__qualname__}{defined_at(environment)}"
            sample.status, sample.error = Status.FAILED, f"{who}: {fault}"
        finally:
            await _close(environment, sample)
        sample.text = context.chat.decode(sample.tokens[sample.prompt_length :])
        return sample

    async def _enter(self, context: GenerateContext, sample: Sample, environment: Any) -> None:
        """Reset the environment, or put it back to where an aborted sample left it."""
        state = sample.metadata.pop(ENVIRONMENT_STATE, None)
        if state is not None:
            with _environments_fault():
                environment.load_state_dict(state)
            return
        if sample.turns:
            sample.metadata[RESTARTED] = sample.metadata.get(RESTARTED, 0) + 1
            sample.messages = list(sample.prompt.messages or [])
        prompt = sample.prompt
        with _environments_fault():
            observation = checked("reset", await environment.reset(prompt), Observation)
        messages = list(observation.messages) or list(prompt.messages or [])
        tools = list(observation.tools) or prompt.tools or []
        if messages == (prompt.messages or []) and tools == (prompt.tools or []):
            tokens = list(prompt.tokens or [])
        else:
            tokens = self._render(context, sample, Observation(tuple(messages), tuple(tools)))
        if sample.turns or tokens != sample.tokens:
            begin_again(sample, tokens)
        sample.messages = messages

    def _render(self, context: GenerateContext, sample: Sample, observation: Observation) -> list[int]:
        """Tokens of an observation; siblings that see the same one share them."""
        known = self._rendered.get(sample.prompt.id)
        if known is not None and known[0] == observation:
            return known[1]
        tokens = context.chat.render_prompt(observation.messages, observation.tools)
        self._rendered[sample.prompt.id] = (observation, tokens)
        if len(self._rendered) > KEPT_PROMPTS:
            self._rendered.popitem(last=False)
        return tokens

    async def _converse(self, context: GenerateContext, sample: Sample, environment: Any) -> Status:
        while True:
            finish_reason = await take_turn(context, sample)
            if finish_reason == "abort":
                if hasattr(environment, "state_dict"):
                    with _environments_fault():
                        sample.metadata[ENVIRONMENT_STATE] = environment.state_dict()
                return Status.ABORTED
            turn = sample.turns[-1]
            said = sample.tokens[turn.start : turn.end]
            action = context.chat.parse(said, finish_reason)
            sample.messages.append(as_message(action))
            started = time.perf_counter()
            with _environments_fault():
                step = checked("step", await environment.step(action), StepResult)
            turn.environment_seconds, turn.reward = time.perf_counter() - started, step.reward
            sample.messages.extend(step.messages)
            if step.info:
                sample.metadata.setdefault("environment", {}).update(step.info)
            if finish_reason == "length":
                return Status.TRUNCATED
            if step.done:
                return Status.COMPLETED
            if len(sample.turns) >= context.max_turns:
                return Status.TRUNCATED
            closed = bool(said) and said[-1] == context.chat.end_of_turn_id
            following = context.chat.render_next(step.messages, closed)
            limit = context.max_context_tokens
            if limit is not None and len(sample.tokens) + len(following) >= limit:
                return Status.TRUNCATED
            sample.append(following)


def as_message(action: Action) -> Message:
    """What the assistant said, as a message of the conversation."""
    message: Message = {"role": "assistant", "content": action.text}
    if action.reasoning:
        message["reasoning_content"] = action.reasoning
    if action.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in action.tool_calls
        ]
    return message


@contextmanager
def _environments_fault() -> Iterator[None]:
    try:
        yield
    except EnvironmentFault:
        raise
    except Exception as error:
        raise EnvironmentFault(described(error)) from error


def checked(method: str, answer: Any, kind: type[Answer]) -> Answer:
    """What an environment's `reset` or `step` returned, if it is what the protocol says.

    Raises:
        EnvironmentFault: it is of another type, or its messages or its reward are.
    """
    if not isinstance(answer, kind):
        raise EnvironmentFault(f"`{method}` returned {_shown(answer)}; a miles.api.{kind.__name__} is expected")
    for field, singular in (("messages", "message with a role"), ("tools", "tool schema")):
        items = getattr(answer, field, ())
        sound = isinstance(items, list | tuple) and all(isinstance(item, Mapping) for item in items)
        if not sound or (field == "messages" and not all("role" in item for item in items)):
            raise EnvironmentFault(
                f"`{method}` returned {kind.__name__}({field}={_shown(items)}); a tuple is expected, each item a "
                f"mapping: a {singular}"
            )
    reward = getattr(answer, "reward", None)
    if reward is not None and not (isinstance(reward, SupportsFloat) and math.isfinite(reward)):
        raise EnvironmentFault(f"`{method}` returned reward={_shown(reward)}; a finite number or None is expected")
    return answer


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


async def _close(environment: Environment, sample: Sample) -> None:
    """A fault while closing costs nobody a finished trajectory."""
    try:
        await environment.close()
    except Exception as error:
        logger.warning("environment of sample %s: closing raised %s: %s", sample.id, type(error).__name__, error)


# ---------------------------------------------------------------------------------------------------------------- SFT


async def dataset(context: GenerateContext, sample: Sample) -> Sample:
    """The data's own response: SFT. No engine is asked.

    A conversation that ends with the assistant is trained on everything the assistant says in it; a prompt with a
    label is trained on the label and the token that ends a response. What exceeds the context is cut off (`TRUNCATED`).

    Raises:
        DataError: the prompt has neither.
    """
    prompt, chat = sample.prompt, context.chat
    if prompt.messages and prompt.messages[-1]["role"] == "assistant":
        tokens, mask = chat.render_conversation(prompt.messages, prompt.tools)
    elif prompt.label is not None and not isinstance(prompt.label, dict | list):
        given, said = list(prompt.tokens or []), chat.render_text(str(prompt.label))
        tokens, mask = given + said, [0] * len(given) + [1] * len(said)
        if chat.stop_token_ids:
            tokens, mask = [*tokens, chat.stop_token_ids[0]], [*mask, 1]
        sample.messages.append({"role": "assistant", "content": str(prompt.label)})
    else:
        raise DataError(
            f"prompt {prompt.id} holds no response to train on: give it a label (keys.label), or messages whose last "
            "is the assistant's"
        )
    limit = context.max_context_tokens
    cut = limit is not None and len(tokens) > limit
    begin_again(sample, [])
    sample.append(tokens[:limit], {LOSS_MASK: mask[:limit]})
    sample.prompt_length = next((i for i, trained in enumerate(mask[:limit]) if trained), len(sample.tokens))
    sample.turns = [Turn(sample.prompt_length, len(sample.tokens), "length" if cut else "stop")]
    sample.text = chat.decode(sample.tokens[sample.prompt_length :])
    sample.status = Status.TRUNCATED if cut else Status.COMPLETED
    return sample
