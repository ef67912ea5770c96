"""The engine `scoring_server`: a teacher behind SGLang's HTTP API, which says how likely it finds given tokens.

One `POST /generate` a sequence, with `input_ids`, no new tokens, and log-probs of the input from its first token on:

    {"meta_info": {"input_token_logprobs": [[null, id, null], [-1.2, id, null], ...],
                   "input_top_logprobs":   [null, [[-0.3, id, null], ...], ...]}}

Temperature. SGLang (0.5.17 and 0.5.23 were read) computes log-probs of input tokens at temperature 1, whatever the
request's `sampling_params.temperature` says; no server flag changes it. A server that offers the request field
`input_logprob_temperature` (proposed as sgl-project/sglang#36213) says in `meta_info` what it applied. At a rollout
temperature other than 1 the field is sent, and an answer without that confirmation is an error: scores of another
distribution than the one that was sampled from are not noticed later.

Ids. SGLang calls the last token of the vocabulary 0 in its answers, though the log-prob is that of the token.

It generates nothing and takes no weights: as a rollout engine it is of no use. `_T` tokens, `_K` likeliest tokens.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from miles.api import (
    ConfigError,
    EngineContext,
    EngineError,
    EngineHealth,
    EnginePart,
    GenerateRequest,
    GenerateResult,
    PauseMode,
)
from miles_distillation.plugin import ScoringServerOptions

logger = logging.getLogger("miles")
PROBE = "12 + 7 = 19\n\tdef naïve(x): return x**2  # 日本語 🙂"
"""Text on which tokenizers of different families differ."""
BUSY = 429
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first further attempt, doubling up to the longest."""


class PassingError(EngineError):
    """A server did not answer, or is busy, or failed: another attempt may succeed."""


class ScoringServer:
    """See `miles.protocols.RolloutEngine`; `score_top` besides. Safe to call from many tasks of one event loop."""

    accepts: frozenset[str] = frozenset()
    generates = False

    def __init__(self, options: ScoringServerOptions, *, context: EngineContext):
        if not options.urls:
            raise ConfigError("scoring_server: it has no url; --opd-teacher-urls gives it one for each teacher")
        self.options = options
        self.tokenizer = context.tokenizer
        self.vocabulary = int(context.hf_config.get_text_config().vocab_size)
        """Of the student: what it asks about, and what it can be told."""
        self.first_pause = FIRST_PAUSE
        self._in_flight = dict.fromkeys(options.urls, 0)
        self._waiting = 0
        self._turns = asyncio.Semaphore(options.concurrency)
        self._http: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Wait until every server answers, and compare its tokenizer with the student's.

        Raises:
            EngineError: a server is not ready in time, holds no generating model, or splits text otherwise.
        """
        if self._http is not None:
            return
        name = self.options.api_key_variable
        if name and not os.environ.get(name):
            raise EngineError(f"scoring_server: the environment variable {name} (api_key_variable) is not set")
        headers = {"Authorization": f"Bearer {os.environ[name]}"} if name else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.options.concurrency)
        self._http = httpx.AsyncClient(timeout=self.options.timeout, limits=limits, headers=headers)
        try:
            await asyncio.gather(*(self._greet(url) for url in self.options.urls))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    # ------------------------------------------------------------------------------------------------------- scoring

    async def score(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """Log-probability of each token given those before it, `[T]` float32, 0 at position 0.

        Raises:
            EngineError: the server fails, refuses, speaks of other tokens, or cannot score at this temperature.
        """
        url, told = await self._ask(tokens, temperature, top=0)
        return self._selected(url, tokens, told)

    async def score_top(self, tokens: Sequence[int], k: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """The `k` likeliest tokens at each position and their log-probs, `[T, K]` int64 and float32, likeliest first.
        Row `t` is what might have stood in place of `tokens[t]`; row 0 is void: ids and log-probs of 0.

        Raises:
            EngineError: see `score`; also when the server says fewer than `k`, or tokens that the student lacks.
        """
        url, told = await self._ask(tokens, temperature, top=k)
        self._selected(url, tokens, told)  # for the check of its tokens
        ids_TK, log_probs_TK = np.zeros((len(tokens), k), np.int64), np.zeros((len(tokens), k), np.float32)
        rows = told.get("input_top_logprobs") or []
        if len(rows) != len(tokens) or any(row is None or len(row) < k for row in rows[1:]):
            raise EngineError(f"{_who(url)} was asked for the {k} likeliest tokens of each place and said fewer")
        if len(tokens) > 1:
            pairs = np.array([[entry[:2] for entry in row[:k]] for row in rows[1:]], np.float64)
            log_probs_TK[1:], ids_TK[1:] = pairs[..., 0], pairs[..., 1]
        if not np.isfinite(log_probs_TK).all():
            raise EngineError(f"{_who(url)} said log-probs that are not finite: k={k} reaches what it masks out")
        if ids_TK.max(initial=0) >= self.vocabulary:
            raise EngineError(
                f"{_who(url)} names token {ids_TK.max()}, and the student's vocabulary has {self.vocabulary}: "
                "teacher and student must share a tokenizer"
            )
        return ids_TK, log_probs_TK

    async def _ask(self, tokens: Sequence[int], temperature: float, top: int) -> tuple[str, dict[str, Any]]:
        """The server that answered, and `meta_info` of its answer."""
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong or not tokens:
            what = f"{wrong[:3]} outside the vocabulary of {self.vocabulary}" if wrong else "none"
            raise EngineError(f"scoring_server: at least one token is needed, each of the student's; got {what}")
        if temperature <= 0:
            raise EngineError(f"scoring_server: temperature={temperature} is no distribution to score under")
        body: dict[str, Any] = {
            "input_ids": [int(token) for token in tokens],
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top,
        }
        if temperature != 1:
            body["input_logprob_temperature"] = temperature
        url, answer = await self._request("/generate", body)
        told = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(told, dict):
            raise EngineError(f"{_who(url)} does not answer as SGLang's /generate does: {str(answer)[:200]!r}")
        reason = told.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise EngineError(f"{_who(url)} aborted the request: {reason.get('message', 'it says no reason')}")
        if temperature != 1 and told.get("input_logprob_temperature") != temperature:
            raise EngineError(
                f"{_who(url)} scores given tokens at temperature 1, and the rollout's is {temperature}: train with "
                "--rollout-temperature 1, use a local teacher (--opd-teacher-load), or serve it with an SGLang that "
                "knows the request field input_logprob_temperature"
            )
        return url, told

    def _selected(self, url: str, tokens: Sequence[int], told: dict[str, Any]) -> np.ndarray:
        rows = told.get("input_token_logprobs") or []
        said, asked = [row[1] for row in rows], [int(token) for token in tokens]
        if said not in (asked, [token if token < self.vocabulary - 1 else 0 for token in asked]):
            raise EngineError(
                f"{_who(url)} was asked about {len(tokens)} tokens and spoke of {len(rows)} which are not the same"
            )
        log_probs_T = np.array([0.0, *(row[0] for row in rows[1:])], np.float32)  # None becomes NaN
        if not np.isfinite(log_probs_T).all():
            place = int(np.flatnonzero(~np.isfinite(log_probs_T))[0])
            raise EngineError(f"{_who(url)} says no finite log-prob of token {tokens[place]} at position {place}")
        return log_probs_T

    # ------------------------------------------------------------------------------------------------------ the wire

    async def _greet(self, url: str) -> None:
        loop = asyncio.get_running_loop()
        deadline, told = loop.time() + self.options.start_timeout, False
        while True:
            try:
                info = await self._first_found(url, None, "/model_info", "/get_model_info")
                break
            except PassingError as error:
                limit = f"start_timeout={self.options.start_timeout:g} seconds"
                if loop.time() + self.first_pause > deadline:
                    raise EngineError(f"{_who(url)} is not ready after {limit}: {error}") from error
                if not told:
                    logger.warning("%s is not ready: %s; waiting up to %s", _who(url), error, limit)
                told = True
                await asyncio.sleep(self.first_pause)
        if info.get("is_generation") is False:
            raise EngineError(f"{_who(url)} serves {info.get('model_path')}, which is no language model")
        if self.options.check_tokenizer and self.tokenizer is not None:
            await self._compare_tokenizers(url)

    async def _compare_tokenizers(self, url: str) -> None:
        body = {"prompt": PROBE, "add_special_tokens": False}
        try:
            theirs = (await self._first_found(url, body, "/v1/tokenize", "/tokenize")).get("tokens")
        except PassingError:
            return  # how a server answers that was started without a tokenizer
        ours = self.tokenizer.encode(PROBE, add_special_tokens=False)
        if theirs is not None and theirs != ours:
            raise EngineError(
                f"{_who(url)} splits text otherwise than the student ({theirs[:6]} ... for {ours[:6]} ...): teacher "
                "and student must share a tokenizer. If they do, and only this text tells them apart, say "
                "check_tokenizer: false"
            )

    async def _first_found(self, url: str, body: dict[str, Any] | None, *paths: str) -> dict[str, Any]:
        """The answer of the first of these paths that the server has; nothing when it has none of them."""
        for path in paths:
            reply = await self._call(url, path, body)
            if reply.status_code in (401, 403):
                raise EngineError(f"{_who(url)} answered {reply.status_code}: it wants an API key (api_key_variable)")
            if reply.status_code == 200 and isinstance(found := _parsed(reply), dict):
                return found
        return {}

    async def _request(self, path: str, body: dict[str, Any]) -> tuple[str, Any]:
        """Ask the least busy server; after a failure that may pass, wait and ask again, another one where there is one.

        Raises:
            EngineError: a server refused, or all attempts failed.
        """
        pause, failed = self.first_pause, dict[str, str]()
        self._waiting += 1
        async with self._turns:
            self._waiting -= 1
            for left in reversed(range(self.options.retries + 1)):
                fresh = [url for url in self._in_flight if url not in failed] or list(self._in_flight)
                url = min(fresh, key=self._in_flight.__getitem__)
                self._in_flight[url] += 1
                try:
                    reply = await self._call(url, path, body)
                    break
                except PassingError as error:
                    failed[url] = str(error)
                    if not left:
                        tried = f"{self.options.retries + 1} attempts"
                        raise EngineError(
                            f"{_who(', '.join(failed))} failed after {tried}, at last: {error}"
                        ) from error
                finally:
                    self._in_flight[url] -= 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        if reply.status_code != 200:
            raise EngineError(f"{_who(url)} refused {path} ({reply.status_code}): {reply.text[:500]}")
        return url, _parsed(reply)

    async def _call(self, url: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """One attempt; PassingError where another one may succeed."""
        if self._http is None:
            raise EngineError(f"{_who(url)} is asked by an engine that is not started, or closed")
        try:
            reply = await self._http.request("GET" if body is None else "POST", url + path, json=body)
        except httpx.InvalidURL as error:
            raise EngineError(f"{_who(url)}: {error}") from error
        except httpx.HTTPError as error:
            raise PassingError(f"{url}{path} did not answer: {error!r}") from error
        if reply.status_code == BUSY or reply.status_code >= 500:
            raise PassingError(f"{url}{path} answered {reply.status_code}: {reply.text[:500]}")
        return reply

    # ----------------------------------------------------------------------------------- what a rollout engine also is

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        raise EngineError(
            f"scoring_server only scores and cannot generate for request {request.id!r}: it is for teacher.engine; "
            "--rollout-engine torch generates"
        )

    async def receive(self, transport: str, version: int, payload: Any) -> None:
        raise EngineError("scoring_server takes no weights: a teacher stays what it is")

    async def health(self) -> EngineHealth:
        return EngineHealth(-1, running=sum(self._in_flight.values()), waiting=self._waiting)

    async def abort(self, request_id: str | None = None) -> None: ...

    async def pause(self, mode: PauseMode = "retract") -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def sleep(self, parts: frozenset[EnginePart]) -> None: ...

    async def wake(self, parts: frozenset[EnginePart]) -> None: ...


def _who(url: str) -> str:
    return f"scoring_server: the server at {url}"


def _parsed(reply: httpx.Response) -> Any:
    """A reply's JSON; its text where it is none."""
    try:
        return reply.json()
    except ValueError:
        return reply.text
