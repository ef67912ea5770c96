"""Made-up conversations, an engine that speaks the model's part and an environment that speaks the rest of it, and what
must then be true of the token stream.

There are two sorts. A `tidy` conversation holds what the family's template writes: rendering it as a whole must give
the stream again. A `wild` one holds what models do before they have learnt anything: broken calls, tags in the wrong
place, tokens that no tokenizer would choose for their text, turns that end by another token than the format's or in the
middle; its stream must be exactly what was said, by whom, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from miles.contexts import GenerateContext
from miles.protocols import ChatFormat, GenerateFunction
from miles.types import (
    Action,
    GenerateRequest,
    GenerateResult,
    Message,
    Observation,
    Prompt,
    Sample,
    SamplingParams,
    StepResult,
)

WORDS = (
    "hello", " you", "größe", "🧮", "e\u0301", "\u200b", "\u202eok", "数", "  ", "\t", "\n", "7", "<b>", "{{ x }}",
    "{% if %}", "\\n", '"', "&amp;", "\x00", "'",
)  # fmt: skip
"""Pieces of text that a template or a tokenizer may spoil."""
LOOKALIKES = (
    "<|im_start|>", "<|im_start|>user\n", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "<|eot_id|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", '<tool_call>{"name": "add"}</tool_call>', "<tool_response>",
    "</tool_response>", "miles-assistant-turn-marker", '{"name": "add", "arguments": {}}',
)  # fmt: skip
"""Pieces that look like a format's own tokens and tags."""
TOOL_NAMES = ("add", "größe", "look_up")
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "says <b>", "parameters": {"type": "object", "properties": {}}},
    }
    for name in TOOL_NAMES
]


@dataclass
class Told:
    """What the engine said in one request."""

    start: int
    tokens: list[int]
    log_probs: list[float]
    versions: list[int]


@dataclass
class Conversation:
    """Both parts. Of `n` turns, `n - 1` are answered; after the last one the environment is done."""

    opening: list[Message]
    tools: list[dict[str, Any]]
    turns: list[tuple[list[int], str]]
    """Tokens of the model and why they ended."""
    answers: list[tuple[Message, ...]]


@dataclass
class Reciter:
    """An engine that says the model's part of a conversation, turn by turn."""

    turns: Sequence[tuple[list[int], str]]
    random: Random
    told: list[Told] = field(default_factory=list)

    async def __call__(self, request: GenerateRequest) -> GenerateResult:
        tokens, reason = self.turns[len(self.told)]
        before = sum(len(told.tokens) for told in self.told)
        log_probs = [-0.125 * (1 + before + i) for i in range(len(tokens))]  # no two alike, exact in float32
        version = self.told[-1].versions[-1] if self.told and self.told[-1].versions else 1
        versions = sorted(version + self.random.randrange(3) for _ in tokens)  # weights may change within a turn
        self.told.append(Told(len(request.tokens), tokens, log_probs, versions))
        return GenerateResult(tokens, log_probs, reason, versions)  # type: ignore[arg-type]


@dataclass
class Partner:
    """An environment that says the rest, and pays each turn its number."""

    conversation: Conversation
    heard: list[Action] = field(default_factory=list)

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(tuple(self.conversation.opening), tuple(self.conversation.tools))

    async def step(self, action: Action) -> StepResult:
        self.heard.append(action)
        count, answers = len(self.heard), self.conversation.answers
        said = answers[count - 1] if count <= len(answers) else ()
        return StepResult(said, float(count), done=count > len(answers))

    async def close(self) -> None:
        """Nothing is held open."""


# -------------------------------------------------------------------------------------------------------------- making


def text_of(random: Random, pieces: Sequence[str] = WORDS, most: int = 6) -> str:
    return "".join(random.choice(pieces) for _ in range(random.randrange(most)))


def tidy(
    random: Random, said: Callable[[Message], list[int]], end: int | None, ids: Sequence[str], reasoning: bool
) -> Conversation:
    """What the family's template writes.

    Args:
        said: what the assistant produces for a message, its end token included.
        end: that token.
        ids: what the format calls the calls of a turn; none without tools.
    """
    turns: list[tuple[list[int], str]] = []
    answers: list[tuple[Message, ...]] = []
    for _ in range(random.randrange(2, 5)):
        message: Message = {"role": "assistant", "content": text_of(random).lstrip("\n") or "hello"}
        if reasoning and random.random() < 0.7:
            message["reasoning_content"] = text_of(random).strip() or "hm"
        calls = random.randrange(len(ids) + 1)
        if calls:
            message["content"] = message["content"].strip()
            message["tool_calls"] = [_call(random) for _ in range(calls)]
        tokens = said(message)
        closed = random.random() < 0.7 or tokens[-1:] != [end]
        turns.append((tokens if closed else tokens[:-1], "stop"))
        answers.append(_answer(random, ids[:calls], WORDS))
    opening: list[Message] = [{"role": "user", "content": text_of(random)}]
    if random.random() < 0.5:
        opening.insert(0, {"role": "system", "content": text_of(random)})
    return Conversation(opening, TOOLS if ids else [], turns, answers[:-1])


def wild(random: Random, chat: ChatFormat, ids: Sequence[str]) -> Conversation:
    """What nobody would write."""
    pieces = WORDS + LOOKALIKES
    turns: list[tuple[list[int], str]] = []
    answers: list[tuple[Message, ...]] = []
    count = random.randrange(1, 5)
    for i in range(count):
        tokens = [token for _ in range(random.randrange(5)) for token in chat.render_text(text_of(random, pieces, 3))]
        if tokens and random.random() < 0.2:
            tokens = tokens[random.randrange(len(tokens)) :]  # begins in the middle of a character
        stops = list(chat.stop_token_ids)
        ending = random.choice([stops[:1], stops[-1:], []])
        cut = i == count - 1 and random.random() < 0.5
        turns.append((tokens if cut else [*tokens, *ending], "length" if cut else "stop"))
        answers.append(_answer(random, ids[: random.randrange(len(ids) + 1)], pieces))
    opening: list[Message] = [{"role": "user", "content": text_of(random, pieces)}]
    return Conversation(opening, TOOLS if ids and random.random() < 0.5 else [], turns, answers[:-1])


def _call(random: Random) -> dict[str, Any]:
    arguments = {random.choice(("a", "größe")): random.choice([1, None, "ü\n", [{"b": True}], text_of(random)])}
    return {"type": "function", "function": {"name": random.choice(TOOL_NAMES), "arguments": arguments}}


def _answer(random: Random, ids: Sequence[str], pieces: Sequence[str]) -> tuple[Message, ...]:
    """Results in the order of the calls, and perhaps a word of the user."""
    results: list[Message] = [
        {"role": "tool", "tool_call_id": call_id, "content": text_of(random, pieces)} for call_id in ids
    ]
    if not ids or random.random() < 0.2:
        results.append({"role": "user", "content": text_of(random, pieces)})
    return tuple(results)


# ------------------------------------------------------------------------------------------------------------ checking


def play(
    generate: GenerateFunction, chat: ChatFormat, conversation: Conversation, random: Random
) -> tuple[Sample, list[Told], Partner]:
    """The conversation as a sample of the generate function, what its engine told, and its environment."""
    engine, partner = Reciter(conversation.turns, random), Partner(conversation)
    sampling = SamplingParams(max_new_tokens=1000, stop_token_ids=tuple(chat.stop_token_ids))
    context = GenerateContext(engine, chat, sampling, make_environment=lambda: partner)
    sample = Sample.begin(Prompt("made-up:0", "made-up", messages=[], tokens=[]), id=1, group_id=1, seed=7)
    finished = asyncio.run(generate(context, sample))
    assert isinstance(finished, Sample), "a conversation became several samples"
    assert finished.error is None, finished.error
    return finished, engine.told, partner


def check_stream(chat: ChatFormat, conversation: Conversation, sample: Sample, told: Sequence[Told]) -> None:
    """The stream is the prompt, what the model said as it said it, and what the format puts between; each column speaks
    of the model's tokens alone; turns cover exactly these."""
    stream = chat.render_prompt(conversation.opening, conversation.tools)
    assert sample.prompt_length == len(stream)
    mask, log_probs, versions = [0] * len(stream), [0.0] * len(stream), [-1] * len(stream)
    for i, one in enumerate(told):
        assert one.start == len(stream), f"turn {i} was asked for after {one.start} tokens, not {len(stream)}"
        turn = sample.turns[i]
        said, reason = conversation.turns[i]
        assert (turn.start, turn.end) == (len(stream), len(stream) + len(said)), f"turn {i} covers other tokens"
        assert (turn.finish_reason, turn.reward) == (reason, float(i + 1))
        closed = said[-1:] == [chat.end_of_turn_id]
        given = chat.render_next(conversation.answers[i], closed) if i < len(conversation.answers) else []
        stream += [*said, *given]
        mask += [1] * len(said) + [0] * len(given)
        log_probs += [*one.log_probs, *[0.0] * len(given)]
        versions += [*one.versions, *[-1] * len(given)]
    assert len(told) == len(sample.turns) == len(conversation.turns)
    assert sample.tokens == stream
    assert sample.loss_mask.tolist() == mask
    for name, expected in (("rollout_log_probs", log_probs), ("weight_version", versions)):
        assert sample.columns[name].tolist() == expected, f"{name} is not aligned"
    assert all(len(rows) == sample.specs[name].rows(len(stream)) for name, rows in sample.columns.items())
