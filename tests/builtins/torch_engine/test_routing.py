"""The experts that tokens were routed to: those of transformers' routers, a row for each position, whatever became of
the request on its way.

`_T` tokens; rows are compared without the order of the experts in them.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

FAMILY = "qwen3_moe"


def stream_of(request, result):
    return request.tokens + result.tokens


def is_like(rows, expected):
    np.testing.assert_array_equal(np.sort(rows, -1), expected)


def check(lab, model, request, result, start=0):
    """All rows from `start` on are what the model chooses for the whole stream of tokens."""
    tokens = stream_of(request, result)
    assert result.routed_experts.shape == (len(tokens) - 1 - start, 3, 2)
    is_like(result.routed_experts, lab.router_choices(model, tokens)[start:])


def asked(lab, tokens, seed=0, **params):
    return lab.request(tokens, seed=seed, id=f"r{seed}", experts=True, **{"max_new_tokens": 60, **params})


async def begun(engine, requests, tokens=5):
    """Tasks for these requests, each of which has at least some tokens."""
    tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    while True:
        await asyncio.sleep(0.001)
        slots = engine.scheduler.slots
        prompts = [len(job.request.tokens) for job in slots.jobs]
        if slots.count == len(requests) and (slots.lengths_S[: slots.count] - prompts).min() > tokens:
            return tasks


# ---------------------------------------------------------------------------------------------------- plain requests


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("prefix_cache_tokens", [None, 0])
def test_prompts_and_answers(lab, family, prefix_cache_tokens):
    """Prompt rows too, also when the prompt came from the cache; and after a slot was given to another request."""
    model = lab.model(family)
    prompts = [[5, 6, 7, 8]] * 3 + [[5, 6, 9]]
    requests = [
        lab.request(p, seed=i, max_new_tokens=4 + 3 * i, temperature=1.0, experts=i != 1) for i, p in enumerate(prompts)
    ]
    for request, result in zip(
        requests, lab.run(model, requests, prefix_cache_tokens=prefix_cache_tokens), strict=True
    ):
        if request.routed_experts:
            check(lab, model, request, result)
        else:
            assert result.routed_experts is None


@pytest.mark.parametrize(("experts", "dtype"), [(255, "uint8"), (256, "int16")])
def test_rows_are_as_small_as_the_number_of_experts_allows(lab, experts, dtype):
    """Up to the last expert: 255 is one where there are 256."""
    model = lab.make_model(FAMILY, num_experts=experts, moe_intermediate_size=4, num_experts_per_tok=16)
    request = asked(lab, list(range(60)), max_new_tokens=200)
    [result] = lab.run(model, [request])
    assert result.routed_experts.dtype == dtype
    expected = lab.router_choices(model, stream_of(request, result))
    assert expected.max() == experts - 1
    is_like(result.routed_experts, expected)


def test_rows_that_the_caller_has_are_left_out(lab):
    """As turns of a conversation do; a prefix of the cache, and one computed, hold the same."""
    first = asked(lab, [5, 6, 7], max_new_tokens=9)

    async def main(engine):
        before = await engine.generate(first)
        tokens = [*stream_of(first, before), 8, 9]
        second = lab.request(tokens, seed=1, experts=True, max_new_tokens=6)
        second.routed_experts_from = len(tokens) - 3
        after = await engine.generate(second)
        assert after.cached_tokens >= len(tokens) - 3
        await engine.flush_cache()
        again = await engine.generate(second)
        assert again.cached_tokens == 0
        return second, after, again

    second, after, again = lab.with_engine(main, FAMILY)
    check(lab, lab.model(FAMILY), second, after, start=second.routed_experts_from)
    check(lab, lab.model(FAMILY), second, again, start=second.routed_experts_from)


def test_long_prompts_in_chunks_and_the_longest_sequence(lab):
    model = lab.model(FAMILY)
    requests = [asked(lab, [i % 60 for i in range(90)], max_new_tokens=400), asked(lab, [3, 4], 1, max_new_tokens=5)]
    results = lab.run(model, requests, max_len=120, max_prefill_tokens=16)
    assert len(stream_of(requests[0], results[0])) == 120
    for request, result in zip(requests, results, strict=True):
        check(lab, model, request, result)


def test_a_stop_string_in_the_middle(lab):
    model, request = lab.model(FAMILY), asked(lab, [5, 6, 7], 3)
    [whole] = lab.run(model, [request])
    string = "".join(lab.Tokenizer().decode(whole.tokens[i : i + 1]) for i in (20, 21))
    stopping = asked(lab, [5, 6, 7], 3, stop=(string,))
    [result] = lab.run(model, [stopping])
    assert result.finish_reason == "stop"
    assert len(result.tokens) <= 22
    check(lab, model, stopping, result)


# ------------------------------------------------------------------------------------------- leaving and coming back


@pytest.mark.parametrize("prefix_cache_tokens", [None, 0])
def test_a_cache_that_is_cut_anew_while_requests_run(lab, prefix_cache_tokens):
    model = lab.model(FAMILY)
    requests = [asked(lab, [5, 6, i], i, max_new_tokens=40 + 50 * i) for i in range(3)]
    options = {"prefix_cache_tokens": prefix_cache_tokens, "kv_cache_tokens": 400, "max_len": 200}
    for request, result in zip(requests, lab.run(model, requests, **options), strict=True):
        check(lab, model, request, result)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_requests_keep_their_rows(lab, mode):
    model, requests = lab.model(FAMILY), [asked(lab, [5, 6, i], i) for i in range(3)]

    async def main(engine):
        tasks = await begun(engine, requests)
        for _ in range(2):
            await engine.pause(mode)
            await engine.resume()
        return await asyncio.gather(*tasks)

    for request, result in zip(requests, lab.with_engine(main, FAMILY), strict=True):
        check(lab, model, request, result)


def test_what_is_computed_again_keeps_the_rows_it_was_drawn_from(lab):
    """Weights change while a request waits in the queue: rows of the old tokens are of the old weights, the pass that
    reads the last of them and those after it are of the new."""
    old, new = lab.model(FAMILY), lab.make_model(FAMILY, seed=1)
    requests = [asked(lab, [5, 6, i], i) for i in range(3)]

    async def main(engine):
        tasks = await begun(engine, requests)
        await engine.pause("retract")
        await engine.receive("inprocess", 2, lab.weights_of(new))
        await engine.resume()
        return await asyncio.gather(*tasks)

    for request, result in zip(requests, lab.with_engine(main, FAMILY), strict=True):
        tokens, by_old = stream_of(request, result), result.weight_versions.count(1)
        border = len(request.tokens) + by_old - 1
        assert 5 < by_old < 60
        assert result.routed_experts.shape == (len(tokens) - 1, 3, 2)
        is_like(result.routed_experts[:border], lab.router_choices(old, tokens)[:border])
        is_like(result.routed_experts[border:], lab.router_choices(new, tokens)[border:])
        assert (lab.router_choices(old, tokens) != lab.router_choices(new, tokens)).any()


def test_weights_that_change_between_two_steps(lab):
    """The cache stays, so later rows come of both; each is there once."""
    old, new = lab.model(FAMILY), lab.make_model(FAMILY, seed=1)
    request = asked(lab, [5, 6, 7])

    async def main(engine):
        [task] = await begun(engine, [request])
        await engine.receive("inprocess", 2, lab.weights_of(new))
        return await task

    result = lab.with_engine(main, FAMILY)
    border = len(request.tokens) + result.weight_versions.count(1) - 1
    assert len(result.routed_experts) == len(stream_of(request, result)) - 1
    is_like(result.routed_experts[:border], lab.router_choices(old, stream_of(request, result))[:border])


def test_aborts(lab):
    """While it runs, while it waits with the tokens it had, and before it ran at all."""
    model, running = lab.model(FAMILY), [asked(lab, [5, 6, i], i) for i in range(2)]

    async def main(engine):
        tasks = await begun(engine, running)
        await engine.abort("r0")
        await engine.pause("retract")
        never = asyncio.ensure_future(engine.generate(asked(lab, [7, 8], 2)))
        await asyncio.sleep(0)
        await engine.abort()
        return await asyncio.gather(*tasks, never)

    *begun_ones, never = lab.with_engine(main, FAMILY)
    assert (never.tokens, never.routed_experts) == ([], None)
    for request, result in zip(running, begun_ones, strict=True):
        assert result.finish_reason == "abort"
        assert len(result.tokens) > 4
        check(lab, model, request, result)


def test_rows_outlive_a_nap(lab):
    model, request = lab.model(FAMILY), asked(lab, [5, 6, 7])

    async def main(engine):
        [task] = await begun(engine, [request])
        await engine.pause("retract")
        await engine.sleep(frozenset({"kv_cache"}))
        await engine.wake(frozenset({"kv_cache"}))
        await engine.resume()
        return await task

    check(lab, model, request, lab.with_engine(main, FAMILY))
