"""Which sample a request is for: what its function asked the engine, and what the engine said."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles.api import ROLLOUT_LOG_PROBS, ROUTED_EXPERTS, WEIGHT_VERSION, GenerateContext, GenerateRequest, Sample

HEADER = "X-Miles-Sample"
_keys = itertools.count(1)
_current: ContextVar[Link | None] = ContextVar("miles_compat_link", default=None)


@dataclass(frozen=True)
class Said:
    """One answer of the engine."""

    start: int
    """Tokens of the request that it answers."""
    prompt: bytes
    """Digest of these."""
    tokens: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    seconds: float
    experts: np.ndarray | None
    """Expert choices of the forward passes up to the one that drew the last token, compact."""


@dataclass(eq=False)
class Link:
    """A sample while its function is at work."""

    sample: Sample
    context: GenerateContext
    prompt: Any = ""
    """What the function was given as the prompt."""
    key: str = field(default_factory=lambda: str(next(_keys)))
    said: list[Said] = field(default_factory=list)
    failure: BaseException | None = None
    """What the engine raised."""
    _asked: Counter[bytes] = field(default_factory=Counter)

    def seed(self, tokens: Sequence[int]) -> int:
        """That of the sample the first time that it asks to go on from `tokens`; others after it, so that several
        answers to one prompt differ, and are the same in every run."""
        digest = digested(tokens)
        self._asked[digest] += 1
        return (self.sample.seed + 0x9E3779B97F4A7C15 * (self._asked[digest] - 1)) % 2**63

    def note(self, request: GenerateRequest, result: Any, seconds: float) -> None:
        self.said.append(
            Said(
                start=len(request.tokens),
                prompt=digested(request.tokens),
                tokens=np.asarray(result.tokens, np.int64),
                log_probs=np.asarray(result.log_probs, np.float32),
                versions=np.asarray(result.weight_versions, np.int32),
                finish_reason=result.finish_reason,
                seconds=seconds,
                experts=result.routed_experts,
            )
        )

    def remember(self, sample: Sample) -> None:
        """What the engine has said of a sample that goes on, turn by turn."""
        for turn in sample.turns:
            rows = slice(turn.start, turn.end)
            experts = sample.columns.get(ROUTED_EXPERTS)
            self.said.append(
                Said(
                    start=turn.start,
                    prompt=digested(sample.tokens[: turn.start]),
                    tokens=np.asarray(sample.tokens[rows], np.int64),
                    log_probs=_rows(sample, ROLLOUT_LOG_PROBS, rows),
                    versions=_rows(sample, WEIGHT_VERSION, rows),
                    finish_reason=turn.finish_reason,
                    seconds=turn.seconds,
                    experts=None if experts is None else experts[: turn.end - 1],
                )
            )

    def enter(self) -> None:
        """From here on, in this task and those that it starts, requests are for this sample."""
        _current.set(self)


def _rows(sample: Sample, column: Any, rows: slice) -> np.ndarray:
    held = sample.columns.get(column.name)
    return column.filled(rows.stop - rows.start) if held is None else held[rows].copy()


def linked() -> Link | None:
    """Whose function this is; None in no function's task."""
    return _current.get()


def digested(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()
