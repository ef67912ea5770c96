"""The official `openai` package, unmodified, as agents use it."""

import asyncio
import json
from dataclasses import replace
from itertools import count

import numpy as np
import openai
import pytest

from miles.api import GenerateContext, SamplingParams, Status
from miles.config import Spec
from miles.testing import tiny
from miles.testing.contract import installed

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "größe"}},
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "ü"]}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "größe", "arguments": {}}\n</tool_call>'


async def streamed(stream):
    """The message that the chunks of a stream are put together to, as clients do it, and why it ended."""
    message, calls, reason = {"role": "assistant", "content": ""}, {}, None
    async for chunk in stream:
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                calls[call.index] = call.model_dump(exclude={"index"})
    return message | ({"tool_calls": [calls[i] for i in sorted(calls)]} if calls else {}), reason


async def with_tools(base_url, prompt, request_kwargs, metadata):
    """Calls tools until none is called, whole or streamed by turns."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        for turn in count():
            how = {"model": "any", "messages": prompt, "tools": TOOLS, "stream": turn % 2 == 0, **request_kwargs}
            reply = await client.chat.completions.create(**how)
            if how["stream"]:
                message, reason = await streamed(reply)
            else:
                message, reason = reply.choices[0].message.model_dump(), reply.choices[0].finish_reason
            prompt.append(message)
            if reason != "tool_calls":
                break
            for call in message["tool_calls"]:
                told = json.dumps([call["function"]["name"], json.loads(call["function"]["arguments"])])
                prompt.append({"role": "tool", "tool_call_id": call["id"], "content": told})
    return {"last": message["content"]}


def blocking_with_tools(base_url, prompt, request_kwargs, metadata):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    while True:
        message = (
            client.chat.completions.create(model="any", messages=prompt, tools=TOOLS, **request_kwargs)
            .choices[0]
            .message
        )
        prompt.append(message)
        if not message.tool_calls:
            return {"last": message.content}
        prompt += [{"role": "tool", "tool_call_id": c.id, "content": c.function.arguments} for c in message.tool_calls]


@pytest.mark.parametrize("agent", [with_tools, blocking_with_tools])
def test_tools_called_one_after_the_other_and_side_by_side(lab, agent):
    engine = lab.Lines(f"let me see\n{CALL}\n{OTHER}", CALL, "it is 3")
    sampling = SamplingParams(max_new_tokens=256, stop_token_ids=engine.chat.stop_token_ids)
    (sample,) = lab.run(agent, engine, sampling=sampling)
    assert (sample.status, sample.metadata["last"], len(sample.turns)) == (Status.COMPLETED, "it is 3", 3)
    assert sample.tokens == engine.streams[-1]
    called = [call["function"] for call in sample.messages[1]["tool_calls"]]
    assert called == [{"name": "add", "arguments": {"a": [1, "ü"]}}, {"name": "größe", "arguments": {}}]
    assert [message["role"] for message in sample.messages] == [
        "user",
        *["assistant", "tool", "tool"],
        *["assistant", "tool"],
        "assistant",
    ]
    produced = sample.columns["weight_version"] == 3
    assert (sample.loss_mask == produced).all()
    assert engine.chat.decode(np.array(sample.tokens)[produced]).count('"add"') == 2


def test_one_call_where_no_more_are_wanted(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        reply = await lab.ask(base_url, prompt, tools=TOOLS, parallel_tool_calls=False)
        message = reply.choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["add"]
        prompt += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}]
        await lab.ask(base_url, prompt, tools=TOOLS)

    engine = lab.Lines(CALL, "done")
    (sample,) = lab.run(agent, engine)
    assert engine.requests[0].sampling.stop == ("</tool_call>",)
    assert sample.tokens == engine.streams[-1]
    end = sample.turns[0].end
    assert sample.tokens[end] == engine.chat.stop_token_ids[0], "the turn that was cut is closed by the format"
    assert not sample.loss_mask[end]


def test_what_streams_tell(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        async with lab.client(base_url) as client:
            options = {"include_usage": True}
            chunks = [
                chunk
                async for chunk in await client.chat.completions.create(
                    model="mine", messages=prompt, stream=True, stream_options=options, logprobs=True
                )
            ]
        assert {chunk.model for chunk in chunks} == {"mine"}
        told = [
            entry.logprob
            for c in chunks
            for choice in c.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
        return {"tokens": chunks[-1].usage.completion_tokens, "told": told}

    (sample,) = lab.run(agent, lab.Lines("hello you"))
    heard = sample.columns["rollout_log_probs"][sample.loss_mask == 1]
    assert sample.metadata["tokens"] == len(heard)
    assert sample.metadata["told"] == [float(value) for value in heard]


# --------------------------------------------------------------------------------------------------- the torch engine


async def chatty(base_url, prompt, request_kwargs, metadata):
    """Turns whole and streamed, with a branch in the middle."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        for turn in range(3):
            how = {"model": "any", "messages": prompt, "tools": TOOLS, "stream": turn == 1, **request_kwargs}
            reply = await client.chat.completions.create(**how)
            message = (await streamed(reply))[0] if how["stream"] else reply.choices[0].message.model_dump()
            prompt += [message, {"role": "user", "content": f"go on {turn}"}]
        await client.chat.completions.create(model="any", messages=[*prompt[:2], prompt[-1]], **request_kwargs)
    return {"reward": 1.0}


class Torch:
    """The torch engine on a tiny model, and the samples of six agents at once."""

    def __init__(self, lab, folder, temperature=1.0):
        config = tiny.hf_config("llama", max_position_embeddings=1024)
        self.context = tiny.engine_context(installed(), config, tiny.checkpoint(folder, config))
        self.chat, self.temperature = tiny.chat_format(installed()), temperature
        self.lab = lab

    async def talk(self, longest=None):
        """Samples of each agent, and what the engine says of them. `longest`: a request that has so many tokens comes
        back aborted, as to make way for new weights."""
        sampling = SamplingParams(self.temperature, max_new_tokens=12, stop_token_ids=self.chat.stop_token_ids)
        engine = installed().build("rollout_engines", Spec(name="torch"), context=self.context)
        await engine.start()
        try:
            function = self.lab.build(chatty)

            async def generate(request):
                most = request.sampling.max_new_tokens
                cut = replace(request.sampling, max_new_tokens=min(most, longest or most))
                result = await engine.generate(replace(request, sampling=cut))
                aborted = result.finish_reason == "length" and cut.max_new_tokens < most
                return replace(result, finish_reason="abort", interrupted=True) if aborted else result

            given = GenerateContext(generate, self.chat, sampling, max_context_tokens=1024)
            lines = self.lab.Lines(chat=self.chat)
            samples = [self.lab.sample(lines) for _ in range(6)]
            for number, sample in enumerate(samples):
                sample.id = sample.rollout_id = sample.seed = number
            found = await asyncio.gather(*(function(given, sample) for sample in samples))
            return found, [[await engine.score(s.tokens, self.temperature) for s in siblings] for siblings in found]
        finally:
            await engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_recorded_is_what_the_engine_says_of_those_tokens(lab, temperature, tmp_path):
    """Log-probs of all that the model said are those of a fresh pass over the whole stream."""
    found, scores = asyncio.run(Torch(lab, tmp_path, temperature).talk())
    assert [len(siblings) for siblings in found] == [2] * 6
    assert len({tuple(sample.tokens) for siblings in found for sample in siblings}) == 12
    for siblings, scored in zip(found, scores, strict=True):
        for sample, score_T in zip(siblings, scored, strict=True):
            produced = sample.columns["weight_version"] >= 0
            told = sample.columns["rollout_log_probs"]
            np.testing.assert_allclose(told[produced], score_T[produced], atol=2e-4)
            assert (told[~produced] == 0).all()
            assert sample.loss_mask.sum() > 0


def test_turns_that_make_way_again_and_again_are_what_they_were(lab, tmp_path):
    torch = Torch(lab, tmp_path)
    whole, _ = asyncio.run(torch.talk())
    in_parts, _ = asyncio.run(torch.talk(longest=3))
    for before, after in zip(whole, in_parts, strict=True):
        for one, other in zip(before, after, strict=True):
            assert (one.tokens, one.status) == (other.tokens, other.status)
            assert (one.loss_mask == other.loss_mask).all()
            ends = [[(turn.start, turn.end, turn.finish_reason) for turn in sample.turns] for sample in (one, other)]
            assert ends[0] == ends[1]
            told = [sample.columns["rollout_log_probs"] for sample in (one, other)]
            np.testing.assert_allclose(*told, atol=2e-4)
