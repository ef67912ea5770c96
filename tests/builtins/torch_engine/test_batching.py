"""Company, order, waiting and cached prefixes change how a response is computed, not what it says."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

GROUPS = [[9, 8, 7, 6, 5], [1, 2, 3], [4] * 9, [1, 2, 3, 4, 5, 6, 7]]


def crowd(lab, samples=3, **params):
    """A group of samples for each prompt, with seeds of their own."""
    return [
        lab.request(prompt, seed=10 * i + j, id=f"{i}.{j}", max_new_tokens=5 + i + 3 * j, temperature=1.0, **params)
        for i, prompt in enumerate(GROUPS)
        for j in range(samples)
    ]


def assert_same(results, others):
    for one, other in zip(results, others, strict=True):
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_output_does_not_depend_on_company_or_order(lab, family):
    model, requests = lab.model(family), crowd(lab)
    together = lab.run(model, requests)
    order = random.Random(0).sample(range(len(requests)), len(requests))
    shuffled = lab.run(model, [requests[i] for i in order])
    assert_same(together, [shuffled[order.index(i)] for i in range(len(requests))])
    assert_same(together, [lab.run(model, [request])[0] for request in requests])


def test_more_requests_than_slots(lab):
    model, requests = lab.model("qwen3"), crowd(lab, samples=8)
    assert_same(lab.run(model, requests), lab.run(model, requests, max_running=3))


def test_arrival_in_dribs_and_drabs(lab):
    model, requests = lab.model("qwen3"), crowd(lab)

    async def main():
        engine = await lab.started(model)
        generator = random.Random(3)

        async def late(request):
            await asyncio.sleep(generator.random() * 0.03)
            return await engine.generate(request)

        try:
            return await asyncio.gather(*(late(request) for request in requests))
        finally:
            await engine.close()

    assert_same(asyncio.run(main()), lab.run(model, requests))


def test_a_cache_that_must_be_cut_anew_while_requests_run(lab):
    """All fit at first; then more arrive, and those that run outgrow their slots."""
    model = lab.model("qwen3")
    requests = [lab.request([i, 3, 5], seed=i, max_new_tokens=150 + i, temperature=1.0) for i in range(20)]
    roomy = lab.run(model, requests)
    assert all(len(result.tokens) == 150 + i for i, result in enumerate(roomy))
    assert_same(roomy, lab.run(model, requests, kv_cache_tokens=700))


def test_long_prompts_are_prefilled_in_chunks(lab):
    model = lab.model("llama")
    generator = random.Random(5)
    prompts = [[generator.randrange(60) for _ in range(length)] for length in (40, 3, 100, 12)]
    requests = [lab.request(prompt, seed=i, max_new_tokens=6) for i, prompt in enumerate(prompts)]
    assert_same(lab.run(model, requests), lab.run(model, requests, max_prefill_tokens=16))


@pytest.mark.parametrize("family", ["qwen3", "qwen2_sliding", "qwen3_moe"])
def test_cached_prefixes_change_nothing_but_the_work(lab, family):
    model, requests = lab.model(family), crowd(lab)
    assert_same(lab.run(model, requests), lab.run(model, requests, prefix_cache_tokens=0))


def test_a_group_computes_its_prompt_once(lab):
    requests = [lab.request([5, 6, 7, 8], seed=i, max_new_tokens=2) for i in range(4)]
    results = lab.run(lab.model("qwen3"), requests)
    assert [result.cached_tokens for result in results] == [0, 4, 4, 4]
    assert len({tuple(result.tokens) for result in results}) > 1


def test_prompts_of_one_batch_share_what_they_begin_with(lab):
    shared = [i % 60 for i in range(50)]
    requests = [lab.request([*shared, i, i + 1], seed=i, max_new_tokens=2) for i in range(4)]
    results = lab.run(lab.model("qwen3"), requests)
    assert [result.cached_tokens for result in results] == [0, 50, 50, 50]


def test_turns_extend_what_was_generated(lab):
    model = lab.model("qwen3")

    async def conversation(**options):
        engine = await lab.started(model, **options)
        tokens, cached, said = [1, 2, 3, 4], [], []
        for turn in range(4):
            result = await engine.generate(lab.request(tokens, seed=7, max_new_tokens=5))
            cached.append(result.cached_tokens)
            said.append(result)
            tokens = [*tokens, *result.tokens, 50 + turn, 11]
        await engine.close()
        return cached, said

    cached, said = asyncio.run(conversation())
    # Each turn adds 7 tokens; the last one generated was never fed to the model.
    assert cached == [0, 8, 15, 22]
    uncached, again = asyncio.run(conversation(prefix_cache_tokens=0))
    assert uncached == [0, 0, 0, 0]
    assert_same(said, again)


def test_flushing_forgets_prefixes(lab):
    async def main():
        engine = await lab.started(lab.model("qwen3"))
        first = await engine.generate(lab.request([1, 2, 3], max_new_tokens=2))
        second = await engine.generate(lab.request([1, 2, 3], max_new_tokens=2))
        await engine.flush_cache()
        third = await engine.generate(lab.request([1, 2, 3], max_new_tokens=2))
        await engine.close()
        return [first, second, third]

    results = asyncio.run(main())
    assert [result.cached_tokens for result in results] == [0, 3, 0]
    assert_same(results[:1], results[1:2])


def test_higher_priority_goes_first(lab):
    done = []

    async def main():
        engine = await lab.started(lab.model("qwen3"), max_running=1)

        async def one(name, priority):
            request = lab.request([1, 2], id=name, max_new_tokens=3)
            request.priority = priority
            await engine.generate(request)
            done.append(name)

        await asyncio.gather(one("a", 0), one("b", 0), one("c", 5))
        await engine.close()

    asyncio.run(main())
    assert done == ["c", "a", "b"]


def test_truncated_sampling_reports_the_renormalised_log_prob(lab):
    model = lab.model("qwen3")
    requests = [lab.request([3, 4, 5], seed=i, max_new_tokens=8, top_k=5, top_p=0.9, min_p=0.05) for i in range(6)]
    for result in lab.run(model, requests):
        probs_TV = lab.reference(model, [3, 4, 5, *result.tokens]).double().exp()[2:-1]
        for probs, token, log_prob in zip(probs_TV, result.tokens, result.log_probs, strict=True):
            ranked = probs.sort(descending=True).values[:5]
            ranked = ranked[(ranked / ranked.sum()).cumsum(0) - ranked / ranked.sum() < 0.9]
            kept = ranked[ranked >= 0.05 * ranked[0]]
            assert probs[token] >= kept[-1] * (1 - 1e-5)
            assert log_prob == pytest.approx(torch.log(probs[token] / kept.sum()).item(), abs=2e-5)


def test_sampling_follows_the_model(lab):
    model, count = lab.model("qwen3"), 3000
    results = lab.run(model, [lab.request([2, 4, 6], seed=i, max_new_tokens=1) for i in range(count)])
    probs = lab.reference(model, [2, 4, 6])[-1].exp()
    seen = torch.bincount(torch.tensor([r.tokens[0] for r in results]), minlength=lab.VOCAB)
    common = probs * count >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * count
    observed = torch.cat([seen[common], seen[~common].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
