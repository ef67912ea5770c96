"""Generate functions: one turn, turns with an environment, or the response that the data holds (SFT).

Token in, token out: what the model produced goes into the stream as it is, with loss mask 1, its log-probabilities and
the version of the weights; what others said is rendered once by the chat format, with loss mask 0. A sample that was
aborted goes on from the tokens it has: its last turn is the one that is not finished.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from miles.api import (
    ENVIRONMENT_FAULT,
    ENVIRONMENT_INFO,
    LOSS_MASK,
    RESTARTED,
    Action,
    ChatFormat,
    ConfigError,
    DataError,
    EnvironmentFault,
    GenerateContext,
    GuardedEnvironment,
    Message,
    MilesError,
    Observation,
    Sample,
    Status,
    StepResult,
    Turn,
    begin_again,
    described,
    guarded,
    take_turn,
)

ENVIRONMENT_STATE = "environment_state"
"""Key of `Sample.metadata` under which a half-finished trajectory keeps its environment's state."""
OPENING = 8
"""Most tokens at the end of a prompt among which the tag is looked for that opens the model's reasoning."""
KEPT_PROMPTS = 1024
STATUS_OF = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


async def single_turn(context: GenerateContext, sample: Sample) -> Sample:
    """One response to the prompt."""
    sample.status = STATUS_OF[await take_turn(context, sample)]
    sample.text = context.chat.decode(sample.tokens[sample.prompt_length :])
    if sample.messages and sample.status is not Status.ABORTED:
        sample.messages.append({"role": "assistant", "content": sample.text})
    return sample


# --------------------------------------------------------------------------------------------------------- multi-turn


class MultiTurn:
    """Model and environment take turns until the environment is done, or a limit is reached.

    The environment's first observation is the prompt; one that gives no messages leaves the prompt of the data. Each
    turn is parsed and handed over whole, with all the tool calls it makes. `TRUNCATED` means that a turn hit its length
    limit (the environment has seen it), that the context has no room for what the environment says next and a token
    after it, or that `max_turns` were taken. What the environment raises, or returns of a wrong type, or a call of it
    that takes too long, makes the sample `FAILED`, with an error that names its class; so does a first observation that
    fills the context. An aborted sample keeps its environment's `state_dict` and goes on from it; if the environment
    has none, it begins again and counts that in its metadata.
    """

    def __init__(self) -> None:
        self._rendered: OrderedDict[str, tuple[Observation, list[int]]] = OrderedDict()

    async def __call__(self, context: GenerateContext, sample: Sample) -> Sample:
        if context.make_environment is None:
            raise ConfigError(f"task set {sample.prompt.task_set!r}: generate: multi_turn needs an environment")
        environment = guarded(context.make_environment())
        context = with_stops(context, getattr(environment, "stop", ()))
        try:
            await self._enter(context, sample, environment)
            sample.status = await self._converse(context, sample, environment)
        except EnvironmentFault as fault:
            sample.status, sample.error = Status.FAILED, str(fault)
            sample.metadata[ENVIRONMENT_FAULT] = fault.facts
        finally:
            await environment.close()
        sample.text = context.chat.decode(sample.tokens[sample.prompt_length :])
        return sample

    async def _enter(self, context: GenerateContext, sample: Sample, environment: GuardedEnvironment) -> None:
        """Reset the environment, or put it back to where an aborted sample left it."""
        state = sample.metadata.pop(ENVIRONMENT_STATE, None)
        if state is not None:
            await environment.resume(state)
            return
        prompt = sample.prompt
        observation = await environment.reset(prompt)
        if sample.turns:
            sample.metadata[RESTARTED] = sample.metadata.get(RESTARTED, 0) + 1
            sample.metadata.pop(ENVIRONMENT_INFO, None)
        messages = list(observation.messages) or list(prompt.messages or [])
        tools = list(observation.tools) or prompt.tools or []
        if messages == (prompt.messages or []) and tools == (prompt.tools or []):
            tokens = list(prompt.tokens or [])
        else:
            if not messages and prompt.text is not None:
                raise environment.fault(
                    "it offers tools, and the prompt is text, which cannot show them: take prompts as messages "
                    "(data.sets[].apply_chat_template), or let `reset` say what is asked"
                )
            shown = Observation(tuple(messages), tuple(tools))
            with _rendering(environment):
                tokens = self._render(context, sample, shown)
            limit = context.max_context_tokens
            if limit is not None and len(tokens) >= limit:
                raise environment.fault(
                    f"its first observation takes {len(tokens)} tokens, which leaves no room for an answer in a "
                    f"context of {limit} (rollout.max_context_len, or the model's own limit)"
                )
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

    async def _converse(self, context: GenerateContext, sample: Sample, environment: GuardedEnvironment) -> Status:
        while True:
            finish_reason = await take_turn(context, sample)
            if finish_reason == "abort":
                if hasattr(environment, "state_dict"):
                    with environment.blamed("state_dict"):
                        sample.metadata[ENVIRONMENT_STATE] = environment.state_dict()
                return Status.ABORTED
            turn = sample.turns[-1]
            said = sample.tokens[turn.start : turn.end]
            action = context.chat.parse([*opening(context.chat, sample.tokens[: turn.start]), *said], finish_reason)
            sample.messages.append(as_message(action))
            started = time.perf_counter()
            step = await environment.step(action)
            turn.environment_seconds = time.perf_counter() - started
            turn.reward = None if step.reward is None else float(step.reward)
            sample.messages.extend(step.messages)
            if step.info:
                sample.metadata.setdefault(ENVIRONMENT_INFO, {}).update(step.info)
            if finish_reason == "length":
                return Status.TRUNCATED
            if step.done:
                return Status.COMPLETED
            if len(sample.turns) >= context.max_turns:
                return Status.TRUNCATED
            with _rendering(environment):
                following = rendered(context.chat, step, said)
            limit = context.max_context_tokens
            if limit is not None and len(sample.tokens) + len(following) >= limit:
                return Status.TRUNCATED
            sample.append(following)


def with_stops(context: GenerateContext, stop: Sequence[str]) -> GenerateContext:
    """The same, with turns that end at these strings, too."""
    if not stop:
        return context
    stops = tuple(dict.fromkeys((*context.sampling.stop, *stop)))
    return replace(context, sampling=replace(context.sampling, stop=stops))


def rendered(chat: ChatFormat, step: StepResult, said: Sequence[int]) -> list[int]:
    """What an environment says after these tokens of the model, up to where the model speaks again."""
    last = said[-1] if said else None
    if step.inline and (last not in chat.stop_token_ids or chat.end_of_turn_id is None):
        return chat.render_text("".join(str(message["content"]) for message in step.messages))
    return chat.render_next(step.messages, last is not None and last == chat.end_of_turn_id)


def opening(chat: ChatFormat, prompt: Sequence[int]) -> list[int]:
    """The end of a prompt that opens the model's reasoning for it, from the tag on; nothing where it does not.

    Read without it, a turn that was cut off in its thoughts would be taken for an answer, and a tool call that is only
    thought of would be executed.
    """
    markup = getattr(chat, "markup", None)
    if markup is None:
        return []
    tag, tail = markup.reasoning[0], list(prompt[-OPENING:])
    ids = chat.render_text(tag)
    if len(ids) == 1:
        start = max((i for i, token in enumerate(tail) if token == ids[0]), default=None)
        return [] if start is None or chat.decode(tail[start + 1 :]).strip() else tail[start:]
    if not chat.decode(tail).rstrip().endswith(tag):
        return []
    return next(tail[i:] for i in range(len(tail) - 1, -1, -1) if tag in chat.decode(tail[i:]))


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
def _rendering(environment: GuardedEnvironment) -> Iterator[None]:
    """What a chat format refuses it says itself; what breaks it (half a surrogate pair) came from the environment."""
    try:
        yield
    except MilesError:
        raise
    except Exception as error:
        raise environment.fault(f"what it said cannot be rendered: {described(error)}") from error


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
