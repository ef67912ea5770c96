"""Asked to be exact, a CPU answers with the same bits in any company: how many run beside a request, when they arrive,
what of its prompt is cached, and how often the cache is cut anew."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

FAMILIES = ["qwen3", "llama", "qwen2_sliding", "qwen3_moe", "qwen2_moe"]


def prompts():
    """Some alone, some with a beginning in common, of which two differ in the last token only."""
    generator = random.Random(1)
    stem = [generator.randrange(60) for _ in range(20)]
    alone = [[generator.randrange(60) for _ in range(generator.randrange(3, 40))] for _ in range(8)]
    return [*alone, *(stem[:shared] + list(range(own)) for shared in (5, 20) for own in (1, 2, 7)), [*stem, 9]]


def crowd(lab):
    """Two samples for each prompt; their lengths pass those at which slots are cut longer."""
    return [
        lab.request(prompt, seed=100 * i + j, id=f"{i}.{j}", max_new_tokens=3 + (7 * i + 13 * j) % 60, temperature=1.0)
        for i, prompt in enumerate(prompts())
        for j in range(2)
    ]


def one_by_one(lab, model, requests, **options):
    return [lab.run(model, [request], **options)[0] for request in requests]


def late(lab, model, requests, **options):
    """They come over some time, in an order of their own."""

    async def main():
        engine = await lab.started(model, **options)
        generator = random.Random(3)

        async def ask(request):
            await asyncio.sleep(generator.random() * 0.1)
            return await engine.generate(request)

        try:
            return await asyncio.gather(*(ask(request) for request in requests))
        finally:
            await engine.close()

    return asyncio.run(main())


def manners(lab, model, requests, **more):
    """Ways to ask for the same."""
    yield "one by one", one_by_one(lab, model, requests, **more)
    yield "late", late(lab, model, requests, **more)
    yield "late, nothing cached", late(lab, model, requests, prefix_cache_tokens=0, **more)
    for options in (
        {"max_running": 3},
        {"max_prefill_tokens": 16},
        {"kv_cache_tokens": 500, "prefix_cache_tokens": 50},
    ):
        yield str(options), lab.run(model, requests, **options, **more)


needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="promised of Intel's MKL only")


@needs_mkl
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_every_bit_is_the_same_in_any_company(lab, family, dtype):
    model, requests = lab.model(family), crowd(lab)
    together = lab.run(model, requests, exact=True, dtype=dtype)
    for manner, answers in manners(lab, model, requests, exact=True, dtype=dtype):
        for request, one, other in zip(requests, together, answers, strict=True):
            assert (one.tokens, one.log_probs) == (other.tokens, other.log_probs), (manner, request.id)


@needs_mkl
@pytest.mark.parametrize("heads", [2, 8])
def test_long_prompts_and_second_turns(lab, heads):
    """What was decoded in the first turn is there or is computed again, in pieces or at once; heads share their keys by
    two and by eight."""
    model = lab.make_model("qwen3", num_attention_heads=heads, num_key_value_heads=1)
    generator = random.Random(2)
    prompts = [[generator.randrange(60) for _ in range(length)] for length in (31, 130, 190, 300)]

    def turn(prompts, **options):
        requests = [lab.request(p, seed=i, max_new_tokens=40, temperature=1.0) for i, p in enumerate(prompts)]
        return [lab.run(model, [r], exact=True, **options)[0] for r in requests], requests

    first, requests = turn(prompts)
    longer = [[*p, *answer.tokens, 5] for p, answer in zip(prompts, first, strict=True)]
    second, later = turn(longer, prefix_cache_tokens=0)

    async def in_one_engine(**options):
        engine = await lab.started(model, exact=True, **options)
        try:
            return [await asyncio.gather(*map(engine.generate, turn)) for turn in (requests, later)]
        finally:
            await engine.close()

    for options in ({}, {"prefix_cache_tokens": 200}, {"max_prefill_tokens": 70}):
        for one, other in zip((first, second), asyncio.run(in_one_engine(**options)), strict=True):
            assert [(a.tokens, a.log_probs) for a in one] == [(a.tokens, a.log_probs) for a in other], options


@needs_mkl
def test_scores_have_the_same_bits_in_any_company_and_are_those_of_the_draws(lab):
    model = lab.model("qwen3")
    answers = lab.run(model, crowd(lab), exact=True)
    drawn = [[*request.tokens, *answer.tokens] for request, answer in zip(crowd(lab), answers, strict=True)]

    async def main():
        engine = await lab.started(model, exact=True)
        try:
            together = await asyncio.gather(*map(engine.score, drawn))
            return together, [await engine.score(tokens) for tokens in drawn]
        finally:
            await engine.close()

    for one, other, answer in zip(*asyncio.run(main()), answers, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[-len(answer.tokens) :], np.float32(answer.log_probs))
