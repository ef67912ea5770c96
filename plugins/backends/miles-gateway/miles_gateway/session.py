"""`Session`: what one sample's agent says to the model, and what of it becomes samples."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

from miles_serve.chat import Answer, ChatLayer
from miles_serve.errors import RequestError
from miles_serve.openai_chat import Chat, one_call
from miles_serve.openai_messages import as_message
from miles_serve.openai_types import ChatBody
from miles_serve.reading import Said
from miles_serve.vocabulary import Vocabulary

from miles.api import (
    ROLLOUT_LOG_PROBS,
    WEIGHT_VERSION,
    ConfigError,
    DataError,
    EngineError,
    EngineLostError,
    GenerateContext,
    GenerateRequest,
    GenerateResult,
    Message,
    Sample,
    Status,
    take_turn,
)
from miles_gateway import asking
from miles_gateway.tree import Branch, Place, Tree

STATUS_OF = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
Render = Callable[[ChatLayer, Place, Sequence[dict[str, Any]] | None], list[int]]


@dataclass(frozen=True)
class Voice:
    """Who gives the replies: what `miles_serve` writes them with."""

    model: str
    tokenizer: Any
    pieces: Vocabulary
    version: int = -1

    def label(self, version: int | None = None) -> str:
        return str(self.version if version is None else version)


class Layer(ChatLayer):
    """A chat layer for one turn, which is read once: it knows what it made of it."""

    request: GenerateRequest
    reading: dict[str, bool]
    _told: list[Said] | None = None

    def said(self, answer: Answer, calls: bool = True, trim: bool = True) -> list[Said]:
        self._told = super().said(answer, calls, trim)
        return self._told

    def told_of(self, result: GenerateResult) -> list[Said]:
        """What the client was told."""
        return self._told or self.said(self.answered(self.request, result), **self.reading)


@dataclass(frozen=True)
class Spoken:
    """A turn of the model that the next request may go on from."""

    layer: Layer
    place: Place
    messages: Sequence[Message]
    branch: Branch
    result: GenerateResult
    end: int


class Session:
    """Takes the requests of one agent, which the task that makes the session runs."""

    def __init__(self, context: GenerateContext, sample: Sample, pieces: Vocabulary, render: Render, strict: bool):
        """
        Args:
            sample: fresh.
            pieces: the vocabulary of the chat format's tokenizer.
            render: tokens of a conversation in which the model has not spoken.
            strict: another sampling than the task set's is refused.
        """
        self.id = uuid.uuid4().hex
        self.context, self.sample, self.pieces, self.render, self.strict = context, sample, pieces, render, strict
        self.tree = Tree(sample)
        self.last: Branch | None = None
        """The branch in which the model spoke last."""
        self.requests = 0
        self.problem: Exception | None = None
        """Why the last request was not answered."""
        self.lost: Exception | None = None
        """What no agent can make up for: what engines raised."""
        self.ignored: set[str] = set()
        """What of requests' sampling was not the task set's."""
        self.closed = False
        self.stopped = False
        """The run wants the sample back in the middle of what its agent does."""
        self._agent = asyncio.current_task()
        self._asked: Counter[bytes] = Counter()
        self._calls = 0
        self._spoken: list[Spoken] = []
        self._work: set[asyncio.Future] = set()

    # ------------------------------------------------------------------------------------------------ what is asked

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around every request: notes why it was not answered.

        Raises:
            RequestError: the session is over.
        """
        if self.closed:
            raise ended(self.id)
        self.requests += 1
        try:
            yield
        except asyncio.CancelledError:
            self.problem = RequestError("its client did not wait for the answer")
            raise
        except Exception as error:
            self.problem = error
            raise
        self.problem = None

    def understood(self, body: ChatBody) -> Chat:
        """A request as `miles_serve` answers it. Raises RequestError, or what the chat format says of the messages."""
        asking.check(body)
        self._check_sampling(body)
        self._learn()
        messages = [as_message(message) for message in body.messages]
        place = self.tree.find(messages, body.tools)

        async def generate(request: GenerateRequest) -> GenerateResult:
            return await self._generate(layer, place, messages, request)

        layer = Layer(self.context.chat, self.pieces, generate)
        prompt = self._prompt(layer, place, body.tools)
        sampling = layer.sampling(asking.sampling(body, self.context.sampling, one_call(layer, body)))
        request = GenerateRequest(body.rid or f"chatcmpl-{uuid.uuid4().hex}", prompt, sampling, self._seed(place))
        voice = Voice(body.model or "policy", self.context.chat.tokenizer, self.pieces)  # type: ignore[attr-defined]
        chat = Chat(voice, body, layer, request.id, [request])
        layer.request, layer.reading = request, chat.reading
        return chat

    def _check_sampling(self, body: ChatBody) -> None:
        other = asking.differing(body, self.context.sampling)
        if other and self.strict:
            raise RequestError(
                f"{', '.join(other)}: not as the task set says; the run trains on its own sampling. Leave it out, or "
                "send `request_kwargs` as they were given.",
                param=other[0],
                code="unsupported_value",
            )
        self.ignored.update(other)

    def _prompt(self, layer: ChatLayer, place: Place, tools: Sequence[dict[str, Any]] | None) -> list[int]:
        mark, limit = place.mark, self.context.max_context_tokens
        if mark is None:
            tokens = self.render(layer, place, tools)
        else:
            tokens = layer.prompt(place.rest, earlier=mark.branch.sample.tokens[: mark.end])
        if limit is not None and len(tokens) >= limit:
            if mark is not None and mark.end == len(mark.branch.sample.tokens):
                mark.branch.full = True
            raise RequestError(
                f"This model's maximum context length is {limit} tokens. The messages are {len(tokens)} tokens, which "
                "leaves no room for an answer.",
                param="messages",
                code="context_length_exceeded",
            )
        return tokens

    def _seed(self, place: Place) -> int:
        """The sample's own; another one when the same thing is asked again."""
        again = self._asked[place.state]
        self._asked[place.state] += 1
        if not again:
            return self.sample.seed
        drawn = blake2b(f"{self.sample.seed}:{place.state.hex()}:{again}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "little") >> 1

    # ------------------------------------------------------------------------------------------------ what is said

    async def _generate(
        self, layer: Layer, place: Place, messages: Sequence[Message], request: GenerateRequest
    ) -> GenerateResult:
        """One turn. When the session ends meanwhile, the turn does too."""
        turn = asyncio.ensure_future(self._speak(layer, place, messages, request))
        self._work.add(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if self.closed:
                raise ended(self.id) from None
            raise
        except (EngineError, DataError, ConfigError) as error:
            self.lost = error
            raise
        except Exception as error:
            self.lost = error
            raise EngineError(f"{type(error).__name__}: {error}") from error
        finally:
            self._work.discard(turn)

    async def _speak(
        self, layer: Layer, place: Place, messages: Sequence[Message], request: GenerateRequest
    ) -> GenerateResult:
        """Let the model speak at a place; if that fails, the branch is as it was."""
        branch = self.tree.branch(place)
        before = len(branch.sample.tokens)
        cached: list[int] = []
        context = replace(self.context, sampling=request.sampling, generate=partial(self._engine, request.seed, cached))
        branch.busy = True
        try:
            if branch.sample.turns and branch.spoke:
                branch.sample.turns[-1].environment_seconds = time.perf_counter() - branch.spoke
            self.tree.say(branch, request.tokens[place.mark.end :] if place.mark else request.tokens)
            if await take_turn(context, branch.sample) == "abort":
                self.stop(branch)
                await asyncio.get_running_loop().create_future()  # until the session is closed
        except BaseException:
            if branch in self.tree.branches and not self.stopped:
                branch.sample = branch.sample.beginning(before)
            raise
        finally:
            branch.busy = False
        if branch not in self.tree.branches:
            self.tree.branches.append(branch)
        branch.full, branch.spoke, self.last = False, time.perf_counter(), branch
        if not isinstance(self.lost, EngineLostError):
            self.lost = None
        result = _last_turn(branch.sample, cached[0] if cached else 0)
        self._spoken.append(Spoken(layer, place, messages, branch, result, len(branch.sample.tokens)))
        return result

    def stop(self, branch: Branch) -> None:
        """A turn was aborted for good: the run wants its sample back. Its agent ends; who runs it sees `stopped`."""
        if not self.stopped and self._agent is not None:
            self.stopped, self.last = True, branch
            self._agent.cancel()

    async def _engine(self, seed: int, cached: list[int], request: GenerateRequest) -> GenerateResult:
        """Branches speak at the same time: each call has an id of its own."""
        self._calls += 1
        result = await self.context.generate(replace(request, id=f"{self.sample.id}.{self._calls}", seed=seed))
        cached.append(result.cached_tokens)
        return result

    def _learn(self) -> None:
        """Recognise from now on what clients have been told."""
        for spoken in self._spoken:
            told = spoken.layer.told_of(spoken.result)
            self.tree.heard(spoken.branch, spoken.place, spoken.messages, reply_of(told), spoken.end)
        self._spoken = []

    # ------------------------------------------------------------------------------------------------ what comes of it

    async def close(self) -> None:
        """No request is taken any more, and those under way end."""
        self.closed = True
        for turn in self._work:
            turn.cancel()
        if self._work:
            await asyncio.wait(self._work)

    @property
    def overflowed(self) -> bool:
        """Whether the last request was refused because it did not fit into the context."""
        return isinstance(self.problem, RequestError) and self.problem.code == "context_length_exceeded"

    @property
    def cut_off(self) -> bool:
        """Whether what happened last is that the model ran out of room, of the context's or of its turn's."""
        said = self.last.sample.turns if self.last else ()
        return self.overflowed or bool(said and said[-1].finish_reason == "length")

    def samples(self) -> list[Sample]:
        """Every branch as a sample: siblings of one rollout. All have the text of the one that spoke last."""
        self._learn()
        text = ""
        if self.last is not None:
            text = self.context.chat.decode(self.last.sample.tokens[self.last.sample.prompt_length :])
        for number, branch in enumerate(self.tree.branches):
            sample = branch.sample
            if number:  # what happened to their rollout is told by the first of them
                sample.metadata = {}
            full = branch.full or (branch is self.last and self.overflowed)
            sample.status = Status.TRUNCATED if full else STATUS_OF[sample.turns[-1].finish_reason]
            sample.messages, sample.text = branch.messages, text
        return [branch.sample for branch in self.tree.branches]

    @property
    def summary(self) -> dict[str, Any]:
        """For people who look in while it goes on."""
        branches = [
            {"turns": len(b.sample.turns), "tokens": len(b.sample.tokens), "speaking": b.busy}
            for b in self.tree.branches
        ]
        return {"id": self.id, "object": "session", "requests": self.requests, "branches": branches}


def reply_of(said: Sequence[Said]) -> Message:
    """What a client was told, as the message that it sends back."""
    reply: Message = {"role": "assistant", "content": "".join(piece.text for piece in said if piece.kind == "text")}
    if reasoning := "".join(piece.text for piece in said if piece.kind == "reasoning"):
        reply["reasoning_content"] = reasoning
    calls = [piece.call for piece in said if piece.call]
    if calls:
        reply["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return reply


def _last_turn(sample: Sample, cached_tokens: int) -> GenerateResult:
    turn = sample.turns[-1]
    columns = (
        sample.columns[column.name][turn.start : turn.end].tolist() for column in (ROLLOUT_LOG_PROBS, WEIGHT_VERSION)
    )
    log_probs, versions = columns
    tokens, reason = sample.tokens[turn.start : turn.end], turn.finish_reason
    return GenerateResult(tokens, log_probs, reason, versions, cached_tokens=cached_tokens)  # type: ignore[arg-type]


def ended(id: str) -> RequestError:
    """What a client hears of a session that is over, or never was."""
    return RequestError(
        f"The session {id!r} is not open: it ended when its agent returned, or there never was one of this name.",
        404,
        code="session_not_found",
    )
