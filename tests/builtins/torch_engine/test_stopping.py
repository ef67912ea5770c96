"""Where responses end."""

from __future__ import annotations

import asyncio

import pytest

from miles.builtins.torch_engine.stopping import StopStrings
from miles.errors import EngineError

A, B, C, D, E = range(5)
AB, E1, E2 = 60, 61, 62
PROMPT = [10, 11, 12]


@pytest.fixture
def strings(lab):
    return StopStrings(lab.Tokenizer(), lab.VOCAB)


@pytest.mark.parametrize(
    ("tokens", "stop", "ends"),
    [
        ([C, A, B], "ab", True),
        ([C, AB], "ab", True),
        ([A, B, C], "ab", False),  # completed earlier
        ([AB, AB], "ba", True),  # across a boundary
        ([A], "ab", False),
        ([AB], "b", True),
        ([E1, E2], "é", True),  # two halves of a character
        ([E1], "é", False),
        ([A, E1, E2], "aé", True),
        ([E1, E2, E1, E2], "éé", True),
        ([A, B, A, B], "ab", True),  # again
    ],
)
def test_the_last_token_completes_a_stop_string(strings, tokens, stop, ends):
    assert strings.completed(tokens, [stop]) is ends


def test_tokens_that_can_complete_a_string(strings):
    last = strings.completing("ab").nonzero()[0].tolist()
    assert last == [B, AB, E1, E2]  # halves of characters are always looked at


def first_text(lab, count=24):
    """What the model says without any stop, and the same as text."""
    (result,) = lab.run(lab.model("qwen3"), [lab.request(PROMPT, seed=1, max_new_tokens=count)])
    return result.tokens, lab.Tokenizer().decode(result.tokens)


def test_generation_ends_with_a_stop_string_that_stays(lab):
    tokens, text = first_text(lab)
    stop = text[6:9]
    at = text.index(stop) + 3
    request = lab.request(PROMPT, seed=1, max_new_tokens=24, stop=("nothing like it", stop))
    (result,) = lab.run(lab.model("qwen3"), [request])
    assert result.finish_reason == "stop"
    assert result.tokens == tokens[: len(result.tokens)]
    assert lab.Tokenizer().decode(result.tokens)[:at].endswith(stop)
    assert stop not in lab.Tokenizer().decode(result.tokens[:-1])


def test_generation_ends_with_a_stop_token_that_stays(lab):
    tokens, _ = first_text(lab)
    stop = tokens[7]
    request = lab.request(PROMPT, seed=1, max_new_tokens=24, stop_token_ids=(stop, 10**6))
    (result,) = lab.run(lab.model("qwen3"), [request])
    assert result.finish_reason == "stop"
    assert result.tokens == tokens[: tokens.index(stop) + 1]


def test_each_request_has_its_own_stops(lab):
    tokens, _ = first_text(lab)
    requests = [
        lab.request(PROMPT, seed=1, max_new_tokens=24, stop_token_ids=(tokens[5],)),
        lab.request(PROMPT, seed=1, max_new_tokens=24),
    ]
    stopped, free = lab.run(lab.model("qwen3"), requests)
    assert len(stopped.tokens) == tokens.index(tokens[5]) + 1
    assert free.tokens == tokens


def test_stop_tokens_are_banned_before_the_minimum(lab):
    model = lab.model("qwen3")
    everything_but = tuple(range(4, lab.VOCAB))
    requests = [
        lab.request(PROMPT, seed=i, max_new_tokens=12, min_new_tokens=6, stop_token_ids=everything_but)
        for i in range(8)
    ]
    for result in lab.run(model, requests):
        assert len(result.tokens) >= 7 or result.finish_reason == "length"
        assert all(token < 4 for token in result.tokens[:6])
        probs = lab.reference(model, PROMPT + result.tokens).exp()[2:-1]
        for step, token in enumerate(result.tokens):
            total = probs[step, :4].sum() if step < 6 else probs[step].sum()
            expected = (probs[step, token] / total).log().item()
            assert result.log_probs[step] == pytest.approx(expected, abs=2e-5)


def test_stop_strings_wait_for_the_minimum(lab):
    tokens, text = first_text(lab)
    request = lab.request(PROMPT, seed=1, max_new_tokens=24, min_new_tokens=10, stop=tuple(set(text)))
    (result,) = lab.run(lab.model("qwen3"), [request])
    assert (result.finish_reason, len(result.tokens)) == ("stop", 10)
    assert result.tokens == tokens[:10]


def test_a_sequence_as_long_as_the_model_allows(lab):
    prompt = [1] * 500
    (result,) = lab.run(lab.model("qwen3"), [lab.request(prompt, max_new_tokens=100)])
    assert (result.finish_reason, len(result.tokens)) == ("length", 12)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(EngineError, match="no tokenizer"):
        StopStrings(None, 10).check("x")


@pytest.mark.parametrize(
    ("tokens", "params", "message"),
    [
        ([], {}, "has 0 tokens"),
        ([1] * 512, {}, "has 512 tokens, must have 1 to 511"),
        ([1, 67], {}, r"outside the vocabulary \[0, 67\)"),
        ([1, -1], {}, "outside the vocabulary"),
        ([1], {"temperature": -0.5}, "temperature -0.5"),
        ([1], {"top_p": 0.0}, "top_p 0.0"),
        ([1], {"min_p": 1.5}, "min_p 1.5"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([1], {"stop": ("",)}, "empty stop string"),
        ([1], {"experts": True}, "the model has none"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(lab, tokens, params, message):
    async def main():
        engine = await lab.started(lab.model("qwen3"))
        try:
            await engine.generate(lab.request(tokens, **params))
        finally:
            await engine.close()

    with pytest.raises(EngineError, match=message):
        asyncio.run(main())
