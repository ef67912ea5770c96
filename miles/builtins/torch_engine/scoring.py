"""Log-probabilities of given tokens, and of the likeliest ones in their place. `_T` tokens, `_K` likeliest tokens."""

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
    top: int = 0
    """How many of the likeliest tokens are wanted, instead of the given ones."""


Scores = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Of the given tokens `[T]` float32, 0 at position 0; or ids and log-probs of the likeliest, `[T, K]` int64 and
float32, likeliest first, 0 in row 0."""


def score(decoder: Decoder, jobs: Sequence[ScoreJob], max_tokens: int) -> list[Scores]:
    """For each job what it wants. Keys and values are kept only while a group is computed."""
    scores: list[Scores] = [np.zeros(0, np.float32)] * len(jobs)
    for group in _groups(jobs, max_tokens):
        for i, found in zip(group, _score_group(decoder, [jobs[i] for i in group], max_tokens), strict=True):
            scores[i] = found
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


def _score_group(decoder: Decoder, jobs: Sequence[ScoreJob], max_tokens: int) -> list[Scores]:
    longest = max(len(job.tokens) for job in jobs)
    memory = Memory(decoder.config, len(jobs) * longest, decoder.device, decoder.dtype)
    cache = KVCache(memory, len(jobs), longest, decoder.exact)
    pieces = [Piece(job.tokens) for job in jobs]
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in jobs]
    done = [0] * len(jobs)
    for group, counts, hidden_TH in prefill(decoder, cache, 0, pieces, max_tokens):
        row = 0
        for i, count in zip(group, counts, strict=True):
            targets = jobs[i].tokens[done[i] + 1 : done[i] + count + 1]
            found[i] += _read(decoder, hidden_TH[row : row + len(targets)], targets, jobs[i])
            done[i] += count
            row += count
    return [_joined(job, parts) for job, parts in zip(jobs, found, strict=True)]


def _read(decoder: Decoder, hidden_TH: Tensor, targets: list[int], job: ScoreJob) -> Iterator[tuple[Tensor, ...]]:
    """Given the hidden states that predict the targets: their log-probs `[T]`, or ids and log-probs of the likeliest
    tokens `[T, K]`, some rows at a time, on the CPU."""
    for start in range(0, len(targets), ROWS):
        log_probs_TV = (decoder.logits(hidden_TH[start : start + ROWS]) / job.temperature).log_softmax(-1)
        if job.top:
            values, ids = log_probs_TV.topk(job.top)
            yield ids.cpu(), values.cpu()
        else:
            wanted = torch.tensor(targets[start : start + ROWS], device=log_probs_TV.device)[:, None]
            yield (log_probs_TV.gather(-1, wanted)[:, 0].cpu(),)


def _joined(job: ScoreJob, parts: Sequence[tuple[Tensor, ...]]) -> Scores:
    """With a void row for the first token, which nothing predicts."""
    if not job.top:
        return torch.cat([torch.zeros(1), *(log_probs for (log_probs,) in parts)]).numpy()
    ids, log_probs = torch.zeros(1, job.top, dtype=torch.int64), torch.zeros(1, job.top)
    return torch.cat([ids, *(i for i, _ in parts)]).numpy(), torch.cat([log_probs, *(v for _, v in parts)]).numpy()
