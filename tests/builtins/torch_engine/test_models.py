"""The decoder computes what transformers computes, for every family it claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
