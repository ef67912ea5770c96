"""Log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.builtins.torch_engine.decoder import Decoder
from miles.builtins.torch_engine.kv_cache import KVCache, Memory
from miles.builtins.torch_engine.prefill import Piece, prefill

ROWS = 1024
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class ScoreJob:
    tokens: list[int]
    temperature: float
    future: Any


def score(decoder: Decoder, jobs: Sequence[ScoreJob], max_tokens: int) -> list[np.ndarray]:
    """For each job `[T]` float32, 0 at position 0. Keys and values are kept only while a group is computed."""
    scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(jobs)
    for group in _groups(jobs, max_tokens):
        for i, log_probs in zip(group, _score_group(decoder, [jobs[i] for i in group], max_tokens), strict=True):
            scores[i] = log_probs
    return scores


def _groups(jobs: Sequence[ScoreJob], max_tokens: int) -> Iterator[list[int]]:
    """Indices in ascending order of length, cut where the tokens exceed one forward pass."""
    group: list[int] = []
    total = 0
    for i in sorted(range(len(jobs)), key=lambda i: len(jobs[i].tokens)):
        if group and total + len(jobs[i].tokens) > max_tokens:
            yield group
            group, total = [], 0
        group.append(i)
        total += len(jobs[i].tokens)
    yield group


def _score_group(decoder: Decoder, jobs: Sequence[ScoreJob], max_tokens: int) -> list[np.ndarray]:
    longest = max(len(job.tokens) for job in jobs)
    cache = KVCache(Memory(decoder.config, len(jobs) * longest, decoder.device, decoder.dtype), len(jobs), longest)
    pieces = [Piece(job.tokens) for job in jobs]
    found: list[list[Tensor]] = [[] for _ in jobs]
    done = [0] * len(jobs)
    for group, counts, hidden_TH in prefill(decoder, cache, 0, pieces, max_tokens):
        row = 0
        for i, count in zip(group, counts, strict=True):
            targets = jobs[i].tokens[done[i] + 1 : done[i] + count + 1]
            found[i].append(_log_probs(decoder, hidden_TH[row : row + len(targets)], targets, jobs[i].temperature))
            done[i] += count
            row += count
    return [torch.cat([torch.zeros(1), *parts]).numpy() for parts in found]


def _log_probs(decoder: Decoder, hidden_TH: Tensor, targets: list[int], temperature: float) -> Tensor:
    """Of each target, given the hidden state that predicts it, `[T]`, on the CPU."""
    parts = []
    for start in range(0, len(targets), ROWS):
        logits = decoder.logits(hidden_TH[start : start + ROWS]) / temperature
        wanted = torch.tensor(targets[start : start + ROWS], device=logits.device)[:, None]
        parts.append((logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True))[:, 0].cpu())
    return torch.cat(parts) if parts else torch.zeros(0)
