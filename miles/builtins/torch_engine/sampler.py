"""Drawing tokens, so that a request's draws depend on nothing but its seed and the position.

Each token needs one uniform number, a hash of (seed, position), and is found by inverting the cumulative distribution
at it. No generator has a state, so neither the order nor the company of requests matters.

Temperature comes first, then top_k, then top_p of what is left, then min_p, as in transformers; log-probabilities are
those of the renormalised remainder. Dimensions: `_B` requests, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.api import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_UNITS = 2.0**52
_BLOCK = 512
_AT_ONCE = 2**25
"""Probabilities whose cumulative sums, which take twice their memory, exist at once."""


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that scatters its input: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def seed_key(seed: int) -> np.uint64:
    """What `uniforms` wants to know of a seed."""
    return mix(np.array([seed % 2**64], np.uint64))[0]


def uniforms(keys_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
    """One number in (0, 1) for each request, float64 with 48 random bits."""
    bits = mix(keys_B ^ mix(positions_B.astype(np.uint64)))
    return ((bits >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of some requests, as tensors. None where no request needs it."""

    greedy_B: Tensor | None
    all_greedy: bool
    temperature_B1: Tensor | None
    truncated: Tensor | None
    """Indices of the requests whose support is cut."""
    limits: Tensor | None
    """`[3, len(truncated), 1]` float64: top_k, top_p, min_p of these."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        greedy = [p.temperature == 0 for p in params]
        temperature = [p.temperature or 1.0 for p in params]
        cut = [i for i, p in enumerate(params) if p.truncates and not greedy[i]]
        limits = [
            [float(params[i].top_k) if params[i].top_k > 0 else torch.inf for i in cut],
            [params[i].top_p if params[i].top_p < 1 else torch.inf for i in cut],
            [params[i].min_p for i in cut],
        ]
        return cls(
            greedy_B=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            temperature_B1=(
                torch.tensor(temperature, device=device)[:, None] if any(t != 1.0 for t in temperature) else None
            ),
            truncated=torch.tensor(cut, device=device) if cut else None,
            limits=torch.tensor(limits, dtype=torch.float64, device=device)[:, :, None] if cut else None,
        )


def draw(
    logits_BV: Tensor, batch: SamplingBatch, uniform_B: Tensor, banned_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each request and its log-probability in the distribution it was drawn from.

    Args:
        logits_BV: float32.
        uniform_B: float64 in (0, 1).
        banned_BV: True where a token must not come. A greedy request's log-probability ignores it: it is the model's.
    """
    scores_BV = logits_BV if banned_BV is None else logits_BV.masked_fill(banned_BV, -torch.inf)
    if batch.all_greedy:
        chosen_B = scores_BV.argmax(-1)
        return chosen_B, _pick(logits_BV.log_softmax(-1), chosen_B)
    shaped_BV = scores_BV if batch.temperature_B1 is None else scores_BV / batch.temperature_B1
    if batch.truncated is not None and batch.limits is not None:
        cut = truncate(shaped_BV[batch.truncated], *batch.limits)
        shaped_BV = shaped_BV.index_copy(0, batch.truncated, cut)
    log_probs_BV = shaped_BV.log_softmax(-1)
    chosen_B = invert_cdf(shaped_BV.softmax(-1), uniform_B)
    if batch.greedy_B is None:
        return chosen_B, _pick(log_probs_BV, chosen_B)
    chosen_B = torch.where(batch.greedy_B, scores_BV.argmax(-1), chosen_B)
    log_probs_B = _pick(log_probs_BV, chosen_B)
    return chosen_B, torch.where(batch.greedy_B, _pick(logits_BV.log_softmax(-1), chosen_B), log_probs_B)


def _pick(values_BV: Tensor, chosen_B: Tensor) -> Tensor:
    return values_BV.gather(-1, chosen_B[:, None])[:, 0]


def truncate(logits_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, min_p_B1: Tensor) -> Tensor:
    """Logits with -inf outside the support. The most probable token always stays; equal logits rank by token id."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    keep_BV = torch.arange(logits_BV.shape[-1], device=logits_BV.device) < top_k_B1
    probs_BV = sorted_BV.masked_fill(~keep_BV, -torch.inf).softmax(-1)
    mass_BV = _fixed_point(probs_BV)
    keep_BV &= mass_BV.cumsum(-1) - mass_BV < top_p_B1 * _UNITS  # what the more probable ones leave open
    keep_BV &= probs_BV >= min_p_B1 * probs_BV[:, :1]
    support_BV = torch.empty_like(keep_BV).scatter_(-1, order_BV, keep_BV)
    return logits_BV.masked_fill(~support_BV, -torch.inf)


def invert_cdf(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform`; it has probability above 0. (Of probabilities
    that are not finite some token comes, and its log-probability tells.)"""
    rows = max(_AT_ONCE // probs_BV.shape[-1], 1)
    found: list[Tensor] = []
    for probs, uniform in zip(probs_BV.split(rows), uniform_B.split(rows), strict=True):
        found.append(_invert(_fixed_point(probs), uniform))
    return torch.cat(found) if len(found) > 1 else found[0]


def _invert(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """In two steps where the vocabulary is large: running sums of blocks, and of one block a row."""
    count, vocabulary = mass_BV.shape
    whole = vocabulary - vocabulary % _BLOCK
    if whole <= 8 * _BLOCK:
        ends_BV = mass_BV.cumsum(-1)
        target_B1 = (uniform_B[:, None] * ends_BV[:, -1:]).long()
        return _first_above(ends_BV, target_B1)[:, 0]
    blocks = mass_BV[:, :whole].view(count, -1, _BLOCK).sum(-1)
    ends_BK = torch.cat((blocks, mass_BV[:, whole:].sum(-1, keepdim=True)), 1).cumsum(-1)
    target_B1 = (uniform_B[:, None] * ends_BK[:, -1:]).long()
    block_B1 = _first_above(ends_BK, target_B1)
    target_B1 = target_B1 - torch.where(block_B1 > 0, ends_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0)
    columns = block_B1 * _BLOCK + torch.arange(_BLOCK, device=mass_BV.device)
    inside = mass_BV.gather(1, columns.clamp(max=vocabulary - 1)).masked_fill_(columns >= vocabulary, 0)
    token_B1 = block_B1 * _BLOCK + _first_above(inside.cumsum(-1), target_B1)
    return token_B1[:, 0].clamp_(max=vocabulary - 1)


def _first_above(ends: Tensor, target_B1: Tensor) -> Tensor:
    """`[B, 1]`: the first column whose running sum exceeds the target; the last one if none does."""
    return torch.searchsorted(ends, target_B1, right=True).clamp_(0, ends.shape[-1] - 1)


def _fixed_point(probs_BV: Tensor) -> Tensor:
    """Probabilities in units of 2^-52, as integers: their sums are exact, in whatever order a device adds them."""
    return (probs_BV * _UNITS).long()
