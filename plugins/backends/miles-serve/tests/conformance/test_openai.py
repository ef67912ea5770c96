"""The official `openai` package as a client: what holds of `miles serve` and of SGLang alike."""

import openai
import pytest

GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server):
    if not server.text:
        pytest.skip("a server without a tokenizer")
    return openai.OpenAI(base_url=f"{server.client.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client):
    (only,) = client.models.list()
    return only.id


def test_text_and_pieces_of_it(server, client, model):
    prompt = server.prompt(60)
    whole = client.completions.create(model=model, prompt=prompt, **GREEDY)
    chunks = list(client.completions.create(model=model, prompt=prompt, stream=True, **GREEDY))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 12, len(prompt) + 12)


def test_several_prompts_with_several_answers(server, client, model):
    prompts = [server.prompt(61), server.prompt(62, 8)]
    reply = client.completions.create(model=model, prompt=prompts, n=2, **GREEDY)
    texts = [choice.text for choice in sorted(reply.choices, key=lambda choice: choice.index)]
    assert len(texts) == 4
    assert (texts[0], texts[2]) == (texts[1], texts[3]), "greedy answers to one prompt differ"
    assert reply.usage.prompt_tokens == sum(map(len, prompts))


def test_a_chat_and_pieces_of_it(client, model):
    params = {"model": model, "messages": [{"role": "user", "content": "hello"}], **GREEDY}
    whole = client.chat.completions.create(**params)
    counted = {"include_usage": True}
    chunks = list(client.chat.completions.create(**params, stream=True, stream_options=counted))
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    content = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert content == (whole.choices[0].message.content or "")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


def test_exact_tokens_and_their_log_probs(server, client, model):
    """What a server of sessions asks for: tokens in, tokens and log-probs out."""
    prompt = server.prompt(63)
    extra = {**GREEDY["extra_body"], "input_ids": prompt, "return_meta_info": True, "return_token_ids": True}
    params = {**GREEDY, "extra_body": extra}
    messages = [{"role": "user", "content": "hello"}]
    choice = client.chat.completions.create(model=model, messages=messages, logprobs=True, **params).choices[0]
    expected = server.generate(prompt, 12)
    assert choice.token_ids == expected["output_ids"]
    rows = choice.meta_info["output_token_logprobs"]
    assert [row[1] for row in rows] == choice.token_ids
    assert [row[0] for row in rows] == pytest.approx([entry.logprob for entry in choice.logprobs.content])
    told = [row[0] for row in expected["meta_info"]["output_token_logprobs"]]
    assert [row[0] for row in rows] == pytest.approx(told, abs=server.tolerance)
    assert choice.meta_info["weight_version"] == expected["meta_info"]["weight_version"]


def test_what_is_wrong_is_an_error_of_the_client(client, model):
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_tokens": -1}, {"extra_body": {"top_k": 0.5}}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], **wrong)
