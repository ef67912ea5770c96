"""The decoder computes what transformers computes, for every family it claims."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from miles.errors import ConfigError

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 3, 1, 4], [5]]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen2_sliding", "llama", "qwen3_moe", "qwen2_moe"])
def test_tokens_and_log_probs_agree_with_transformers(lab, family):
    model = lab.model(family)
    requests = [lab.request(p, seed=i, max_new_tokens=12, temperature=0.0) for i, p in enumerate(PROMPTS)]
    requests += [lab.request(p, seed=i, max_new_tokens=12, temperature=0.8) for i, p in enumerate(PROMPTS)]
    for request, result in zip(requests, lab.run(model, requests), strict=True):
        greedy = request.sampling.temperature == 0
        assert len(result.tokens) == 12
        assert result.finish_reason == "length"
        log_probs = lab.reference(model, request.tokens + result.tokens, 1.0 if greedy else 0.8)
        rows = log_probs[len(request.tokens) - 1 : -1]
        expected = rows.gather(-1, torch.tensor(result.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(result.log_probs, expected, atol=1e-5)
        if greedy:
            assert result.tokens == rows.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_bf16_agrees_within_its_precision(lab, family):
    model = lab.make_model(family, seed=4).to(torch.bfloat16)
    requests = [lab.request(p, seed=i, max_new_tokens=12, temperature=1.0) for i, p in enumerate(PROMPTS * 2)]
    gaps = []
    for request, result in zip(requests, lab.run(model, requests, dtype="bf16"), strict=True):
        rows = lab.reference(model, request.tokens + result.tokens)[len(request.tokens) - 1 : -1]
        expected = rows.gather(-1, torch.tensor(result.tokens)[:, None])[:, 0]
        gaps.append(np.abs(np.array(result.log_probs) - expected.numpy()))
    exact = lab.make_model(family, seed=4)
    for request, result in zip(requests[:1], lab.run(model, requests[:1], dtype="bf16"), strict=True):
        tokens = request.tokens + result.tokens
        rounding = (lab.reference(exact, tokens) - lab.reference(model, tokens)).abs().mean()
    assert 0 < np.concatenate(gaps).mean() < 2 * rounding.item()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
)
def test_scaled_rotary_embeddings(lab, changes):
    model = lab.make_model("llama", rope_parameters=changes)
    request = lab.request(PROMPTS[2], max_new_tokens=10, temperature=1.0)
    (result,) = lab.run(model, [request])
    rows = lab.reference(model, request.tokens + result.tokens)[len(request.tokens) - 1 : -1]
    expected = rows.gather(-1, torch.tensor(result.tokens)[:, None])[:, 0]
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type must be one of"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(lab, changes, message):
    async def main():
        engine = lab.make_engine(lab.make_model("llama", **changes))
        await engine.start()

    with pytest.raises(ConfigError, match=message):
        asyncio.run(main())
