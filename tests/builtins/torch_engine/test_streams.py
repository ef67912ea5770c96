"""A request's tokens as they are made."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from miles.errors import EngineError


async def rest_of(stream):
    return [piece async for piece in stream]


async def collected(engine, request):
    return await rest_of(engine.stream(request))


def test_streams_beside_others_are_what_generate_returns(lab):
    requests = [lab.request([5, 6, i], seed=i, id=f"r{i}", max_new_tokens=10 + 9 * i) for i in range(6)]
    whole = lab.run(lab.model("qwen3"), requests)

    async def main(engine):
        return await asyncio.gather(*(collected(engine, request) for request in requests))

    for pieces, complete in zip(lab.with_engine(main, max_running=4), whole, strict=True):
        assert [token for piece in pieces for token in piece.tokens] == complete.tokens
        np.testing.assert_allclose([p for piece in pieces for p in piece.log_probs], complete.log_probs, atol=1e-5)
        assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
        assert all(len(piece.tokens) == len(piece.weight_versions) for piece in pieces)


def test_pieces_come_before_the_end(lab):
    """An engine that is paused in the middle has told what it had."""

    async def main(engine):
        stream = engine.stream(lab.request([5, 6], max_new_tokens=400))
        first = await anext(stream)
        await engine.pause("retract")
        so_far = len(first.tokens)
        await engine.resume()
        rest = await rest_of(stream)
        return so_far, so_far + sum(len(piece.tokens) for piece in rest)

    told, total = lab.with_engine(main)
    assert 0 < told < 50
    assert total == 400


def test_experts_come_with_the_last_piece(lab):
    request = lab.request([5, 6, 7], max_new_tokens=12, experts=True)

    async def main(engine):
        return await collected(engine, request), await engine.generate(request)

    pieces, whole = lab.with_engine(main, family="qwen3_moe")
    assert len(pieces) > 1
    assert [piece.routed_experts is None for piece in pieces[:-1]] == [True] * (len(pieces) - 1)
    np.testing.assert_array_equal(pieces[-1].routed_experts, whole.routed_experts)


def test_pieces_carry_the_version_that_made_them(lab):
    async def main(engine):
        stream = engine.stream(lab.request([5, 6], max_new_tokens=300))
        pieces = [await anext(stream)]
        await engine.pause("in_place")
        await engine.receive("inprocess", 9, lab.weights_of(lab.make_model("qwen3", seed=1)))
        await engine.resume()
        return [*pieces, *await rest_of(stream)]

    pieces = lab.with_engine(main)
    versions = [version for piece in pieces for version in piece.weight_versions]
    assert versions == sorted(versions)
    assert versions[0] == 1
    assert versions[-1] == 9
    assert len(versions) == 300


def test_a_stream_that_is_closed_is_aborted(lab):
    async def main(engine):
        stream = engine.stream(lab.request([5, 6], max_new_tokens=400))
        await anext(stream)
        await stream.aclose()
        await engine.generate(lab.request([1], max_new_tokens=1))
        return await engine.health()

    assert lab.with_engine(main).running == 0


def test_a_stream_ends_with_its_engine(lab):
    async def main(engine):
        stream = engine.stream(lab.request([5, 6], max_new_tokens=400))
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await rest_of(stream)

    lab.with_engine(main)
