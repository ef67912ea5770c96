"""Draws follow the distribution, depend on seed and position alone, and truncation keeps what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miles.builtins.torch_engine.sampler import SamplingBatch, draw, invert_cdf, seed_key, truncate, uniforms
from miles.types import SamplingParams

CPU = torch.device("cpu")


def many_uniforms(count: int, position: int = 7) -> torch.Tensor:
    keys = np.array([seed_key(seed) for seed in range(count)])
    return torch.from_numpy(uniforms(keys, np.full(count, position)))


def reference_support(probs: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Token by token: the k most probable, then the fewest that hold top_p of them, then those within min_p."""
    ranked = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[: top_k if top_k > 0 else None]
    total, mass, kept = sum(probs[i] for i in ranked), 0.0, []
    for i in ranked:
        if mass < top_p or top_p == 1:
            kept.append(i)
        mass += probs[i] / total
    return {i for i in kept if probs[i] >= min_p * probs[kept[0]]}


def test_uniforms_are_uniform_and_differ_between_seeds_and_positions():
    values = np.sort(many_uniforms(4000).numpy())
    assert np.abs(values - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov at 1 %
    keys = np.full(4000, seed_key(3))
    along = uniforms(keys, np.arange(4000))
    assert len(np.unique(along)) == 4000
    assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(along, many_uniforms(4000).numpy())[0, 1]) < 0.05
    np.testing.assert_array_equal(along, uniforms(keys, np.arange(4000)))


def test_any_integer_is_a_seed():
    assert seed_key(-1) == seed_key(2**64 - 1)
    assert seed_key(2**64 + 5) == seed_key(5)


@pytest.mark.parametrize("vocabulary", [7, 1500, 4096, 4700, 5120])
def test_inverse_of_the_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(300, vocabulary, generator=generator) * 3).softmax(-1)
    probs[:, 1:5] = 0
    probs[:, -1] = 0
    uniform = many_uniforms(300)
    found = invert_cdf(probs, uniform).numpy()
    ends = probs.double().cumsum(-1).numpy()
    targets = uniform.numpy() * ends[:, -1]
    expected = np.array([np.searchsorted(row, target, side="right") for row, target in zip(ends, targets, strict=True)])
    # A draw within rounding error of a boundary may fall on either side of it.
    gap = np.abs(ends[np.arange(300), np.minimum(found, expected)] - targets)
    assert ((found == expected) | (gap < 1e-6)).all()
    assert (probs[torch.arange(300), torch.from_numpy(found)] > 0).all()


@pytest.mark.parametrize("vocabulary", [5, 5000])
def test_extreme_draws_stay_within_the_support(vocabulary):
    probs = torch.zeros(2, vocabulary)
    probs[:, 2] = 1.0
    edges = torch.tensor([2.0**-49, 1 - 2.0**-49], dtype=torch.float64)
    assert invert_cdf(probs, edges).tolist() == [2, 2]


@pytest.mark.parametrize("vocabulary", [7, 5000])
def test_draws_follow_the_distribution(vocabulary):
    logits = torch.full((1, vocabulary), -torch.inf)
    logits[0, -5:] = torch.tensor([0.1, 1.0, -1.0, 2.0, 0.5])
    count = 20000
    batch = SamplingBatch.of([SamplingParams(temperature=1.7)] * count, CPU)
    chosen, log_probs = draw(logits.expand(count, -1), batch, many_uniforms(count))
    expected = (logits[0] / 1.7).softmax(-1)
    torch.testing.assert_close(log_probs, expected.log()[chosen])
    seen = torch.bincount(chosen, minlength=vocabulary)[-5:].double()
    chi_square = ((seen - count * expected[-5:]) ** 2 / (count * expected[-5:])).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(3, 1.0, 0.0), (-1, 0.7, 0.0), (-1, 1.0, 0.3), (4, 0.8, 0.0), (5, 0.9, 0.2), (1, 0.01, 1.0), (100, 1.0, 0.0)],
)
def test_truncation_keeps_what_the_definition_says(top_k, top_p, min_p):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(1)) * 2
    params = SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    uniform = many_uniforms(50)
    chosen, log_probs = draw(logits, SamplingBatch.of([params] * 50, CPU), uniform)
    for row in range(50):
        probs = (logits[row].double() / 0.9).softmax(-1)
        support = sorted(reference_support(probs.tolist(), top_k, top_p, min_p))
        kept = probs[support] / probs[support].sum()
        ends = kept.cumsum(0)
        token = support[int((ends <= uniform[row] * ends[-1]).sum())]
        assert chosen[row] == token
        assert log_probs[row].item() == pytest.approx(kept[support.index(token)].log().item(), abs=1e-5)


def test_equal_logits_rank_by_token():
    limits = torch.tensor([[2.0], [torch.inf], [0.0]]).unsqueeze(-1)
    assert truncate(torch.zeros(1, 4), *limits).isfinite().tolist() == [[True, True, False, False]]


def test_rows_of_a_batch_do_not_share_parameters():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4, -1)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=1.0, top_k=1),
    ]
    uniform = torch.full((4,), 1e-6, dtype=torch.float64)  # the first token, where it may be drawn at all
    chosen, log_probs = draw(logits, SamplingBatch.of(params, CPU), uniform)
    assert chosen.tolist() == [2, 0, 0, 2]
    row = torch.tensor([0.0, 1.0, 2.0])
    expected = [row.log_softmax(-1)[2], row.log_softmax(-1)[0], (row / 2).log_softmax(-1)[0], torch.tensor(0.0)]
    torch.testing.assert_close(log_probs, torch.stack(expected))


def test_banned_tokens_do_not_come_and_greedy_log_probs_are_the_models():
    logits = torch.tensor([[3.0, 1.0, 2.0]]).expand(2, -1)
    banned = torch.tensor([[True, False, False]]).expand(2, -1)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)]
    uniform = torch.full((2,), 0.99, dtype=torch.float64)
    chosen, log_probs = draw(logits, SamplingBatch.of(params, CPU), uniform, banned)
    assert chosen.tolist() == [2, 2]
    full, rest = logits[0].log_softmax(-1), logits[0, 1:].log_softmax(-1)
    torch.testing.assert_close(log_probs, torch.stack([full[2], rest[1]]))


def test_logits_that_are_not_finite_do_not_point_outside_the_vocabulary():
    logits = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [0.0, 1.0, 2.0]])
    chosen, log_probs = draw(logits, SamplingBatch.of([SamplingParams()] * 3, CPU), many_uniforms(3))
    assert ((chosen >= 0) & (chosen < 3)).all()
    assert log_probs.isfinite().tolist() == [False, False, True]
