"""Log-probabilities of given tokens."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

from miles.errors import EngineError


def sequences(count=5, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(60) for _ in range(generator.randrange(1, 40))] for _ in range(count)]


@pytest.mark.parametrize("max_prefill_tokens", [8192, 16])
def test_scores_are_transformers_log_probs(lab, max_prefill_tokens):
    model, batch = lab.model("qwen3"), sequences()

    async def main():
        engine = await lab.started(model, max_prefill_tokens=max_prefill_tokens)
        running = asyncio.ensure_future(engine.generate(lab.request([1, 2], max_new_tokens=50)))
        scores = await asyncio.gather(*(engine.score(tokens, 0.7) for tokens in batch))
        await running
        await engine.close()
        return scores

    for tokens, score in zip(batch, asyncio.run(main()), strict=True):
        assert (score.dtype, score.shape) == (np.float32, (len(tokens),))
        assert score[0] == 0
        rows = lab.reference(model, tokens, 0.7)[:-1]
        expected = rows.gather(-1, torch.tensor(tokens[1:], dtype=torch.int64)[:, None])[:, 0]
        np.testing.assert_allclose(score[1:], expected, atol=1e-5)


@pytest.mark.parametrize("max_prefill_tokens", [8192, 16])
def test_the_likeliest_tokens_are_transformers(lab, max_prefill_tokens):
    model, batch = lab.model("qwen3"), sequences(3)

    async def main():
        engine = await lab.started(model, max_prefill_tokens=max_prefill_tokens)
        try:
            with pytest.raises(EngineError, match="the 68 likeliest of 67"):
                await engine.score_top([1, 2], 68)
            return await asyncio.gather(*(engine.score_top(tokens, 5, 0.7) for tokens in batch), engine.score(batch[0]))
        finally:
            await engine.close()

    *found, _ = asyncio.run(main())
    for tokens, (ids_TK, log_probs_TK) in zip(batch, found, strict=True):
        assert (ids_TK.dtype, log_probs_TK.dtype) == (np.int64, np.float32)
        assert ids_TK.shape == log_probs_TK.shape == (len(tokens), 5)
        assert not ids_TK[0].any()
        assert not log_probs_TK[0].any()
        values, ids = lab.reference(model, tokens, 0.7)[:-1].topk(5)
        np.testing.assert_allclose(log_probs_TK[1:], values, atol=1e-5)
        np.testing.assert_array_equal(ids_TK[1:], ids)


def test_scores_that_cannot_be_computed(lab):
    async def main(tokens, temperature=1.0):
        engine = await lab.started(lab.model("qwen3"))
        try:
            return await engine.score(tokens, temperature)
        finally:
            await engine.close()

    with pytest.raises(EngineError, match="temperature 0.0"):
        asyncio.run(main([1, 2], 0.0))
    with pytest.raises(EngineError, match="outside the vocabulary"):
        asyncio.run(main([1, 67]))
    assert len(asyncio.run(main([1] * 512))) == 512


def test_a_request_that_comes_as_another_is_taken_up_is_not_lost(lab):
    """What puts it into its place is made in the event loop, before the engine's thread is through with the first."""

    async def main():
        engine = await lab.started(lab.model("qwen3"))
        loop, score, late = asyncio.get_running_loop(), engine.scheduler._score, []

        async def ask():
            late.append(asyncio.ensure_future(engine.score([7, 8, 9])))
            await asyncio.sleep(0)

        def interrupted():
            if not late:
                asyncio.run_coroutine_threadsafe(ask(), loop).result()
            score()

        engine.scheduler._score = interrupted
        await engine.score([1, 2])
        scores = await asyncio.wait_for(late[0], 10)
        await engine.close()
        return scores

    assert asyncio.run(main()).shape == (3,)
