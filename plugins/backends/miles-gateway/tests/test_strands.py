"""The `strands-agents` package, unmodified, with a Python tool: its OpenAI provider in sessions."""

import asyncio
import json

import numpy as np
import pytest
import torch
from strands import Agent, tool
from strands.models.openai import OpenAIModel
from strands.types.exceptions import MaxTokensReachedException

from miles.api import GenerateContext, Prompt, Sample, SamplingParams, Status
from miles.config import Spec
from miles.testing import tiny
from miles.testing.contract import installed

SYSTEM = "Be brief."
QUESTION = "What is 12 and 7?"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def call(name="add", arguments='{"a": 12, "b": 7}'):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def asking(stream=True, **limits):
    """An agent that asks its question, written as strands' documentation does; it keeps what was said."""

    async def agent(base_url, prompt, request_kwargs, metadata):
        client = {"base_url": base_url, "api_key": "none", "max_retries": 0}
        model = OpenAIModel(client_args=client, model_id="any", params=request_kwargs, stream=stream)
        helper = Agent(model=model, tools=[add], system_prompt=SYSTEM, callback_handler=None)
        result = await helper.invoke_async(QUESTION, **limits)
        return {"answer": str(result).strip(), "stopped": result.stop_reason, "history": helper.messages}

    return agent


def run(lab, agent, engine, longest=256):
    """The samples that come of an agent, whose turns have so many tokens at most."""
    sampling = SamplingParams(max_new_tokens=longest, stop_token_ids=engine.chat.stop_token_ids)
    return lab.run(agent, engine, sampling=sampling)


def results(sample):
    """What the tools answered, as strands told the model."""
    blocks = [block for message in sample.metadata["history"] for block in message["content"]]
    return [block["toolResult"]["content"][0]["text"] for block in blocks if "toolResult" in block]


@pytest.mark.parametrize("stream", [True, False])
def test_a_tool_is_called_and_every_token_of_the_model_is_kept(lab, stream):
    engine = lab.Lines(call(), "It is 19.")
    (sample,) = run(lab, asking(stream), engine)
    assert (sample.status, sample.metadata["answer"], sample.metadata["stopped"]) == (
        Status.COMPLETED, "It is 19.", "end_turn",
    )  # fmt: skip
    assert results(sample) == ["19"]
    first, second = engine.requests
    assert second.tokens[: len(engine.streams[0])] == engine.streams[0]
    assert sample.tokens == engine.streams[1]
    spoken = np.zeros(len(sample.tokens), bool)
    spoken[len(first.tokens) : len(engine.streams[0])] = True
    spoken[len(second.tokens) :] = True
    assert (sample.loss_mask == spoken).all()
    log_probs = sample.columns["rollout_log_probs"]
    assert np.allclose(log_probs[spoken], [-0.001 * (1 + i) for i in range(spoken.sum())])
    assert (log_probs[~spoken] == 0).all()


def test_what_the_model_is_shown_is_what_its_format_renders(lab):
    engine = lab.Lines(call(), "It is 19.")
    run(lab, asking(), engine)
    spec = add.tool_spec
    function = {"name": "add", "description": "Add two numbers.", "parameters": spec["inputSchema"]["json"]}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    shown = engine.chat.render_prompt(messages, [{"type": "function", "function": function}])
    assert engine.requests[0].tokens == shown
    answered = engine.chat.render_next([{"role": "tool", "content": "19"}])
    assert engine.requests[1].tokens == [*engine.streams[0], *answered]


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        pytest.param(f"I will add.\n{call()}", ["19"], id="text before it"),
        pytest.param(f"\n{call()}\n\n", ["19"], id="blanks around it, which strands leaves out"),
        pytest.param(f"<think>\nhm\n</think>\n\n{call()}", ["19"], id="thoughts, which strands leaves out"),
        pytest.param(call() + call(arguments='{"a": 1, "b": 1}'), ["19", "2"], id="two at once"),
        pytest.param(call(arguments='{ "b":7,"a":12 }'), ["19"], id="another notation of JSON"),
        pytest.param(call(arguments='"{\\"a\\": 12, \\"b\\": 7}"'), ["19"], id="arguments as text"),
        pytest.param(call(arguments='{"a": 1e1, "b": 7, "ü": 3}'), ["17"], id="arguments nobody asked for"),
        pytest.param(call("sum"), ["Unknown tool: sum"], id="a tool that there is not"),
    ],
)
def test_what_was_said_is_recognised_in_what_strands_makes_of_it(lab, said, answers):
    engine = lab.Lines(said, "Well.")
    (sample,) = run(lab, asking(), engine)
    assert results(sample) == answers
    assert len(sample.turns) == 2
    assert sample.tokens == engine.streams[1]
    assert sample.tokens[: len(engine.streams[0])] == engine.streams[0]


def test_a_tool_that_fails_is_told_to_the_model(lab):
    engine = lab.Lines(call(arguments='{"a": "x", "b": 7}'), "Well.")
    (sample,) = run(lab, asking(), engine)
    (told,) = results(sample)
    assert told.startswith("Error: Validation failed")
    assert told in engine.chat.decode(engine.requests[1].tokens)


def test_a_name_that_strands_replaces_begins_another_branch(lab):
    engine = lab.Lines(call("add two"), "Well.")
    first, second = run(lab, asking(), engine)
    assert first.rollout_id == second.rollout_id
    assert first.tokens == engine.streams[0]
    assert second.tokens == engine.streams[1]
    assert "INVALID_TOOL_NAME" in engine.chat.decode(second.tokens)
    said = len(engine.streams[1]) - len(engine.requests[1].tokens)
    assert second.loss_mask.sum() == said
    assert first.trainable_tokens == len(engine.streams[0]) - len(engine.requests[0].tokens)


def test_a_limit_of_turns_ends_it_in_order(lab):
    engine = lab.Lines(call())
    (sample,) = run(lab, asking(limits={"turns": 3}), engine)
    assert (sample.status, sample.metadata["stopped"], len(sample.turns)) == (Status.COMPLETED, "limit_turns", 3)


def test_a_turn_that_is_cut_off_is_an_error_of_strands_that_agents_may_catch(lab):
    (sample,) = run(lab, asking(), lab.Lines("hello you and you"), longest=4)
    assert (sample.status, sample.reward) == (Status.TRUNCATED, None)
    assert "MaxTokensReachedException" in sample.error

    async def catching(base_url, prompt, request_kwargs, metadata):
        try:
            await asking()(base_url, prompt, request_kwargs, metadata)
        except MaxTokensReachedException:
            return {"reward": 0}

    (sample,) = run(lab, catching, lab.Lines("hello you and you"), longest=4)
    assert (sample.status, sample.reward, sample.trainable_tokens) == (Status.TRUNCATED, 0.0, 4)


# ----------------------------------------------------------------------------------------------------- the torch engine


def conversation():
    """Messages and tools of an agent that calls its tool once."""
    function = {"name": "add", "arguments": {"a": 12, "b": 7}}
    spec = OpenAIModel(model_id="any").format_request([], [add.tool_spec])["tools"]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "19"},
        {"role": "assistant", "content": "It is 19."},
    ], spec


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A checkpoint that knows one conversation by heart, the conversation's tokens and which of them it says."""
    chat = tiny.chat_format(installed())
    tokens, mask = chat.render_conversation(*conversation())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 1024}
    config = tiny.hf_config("llama", **sizes, initializer_range=0.05)
    folder = tiny.checkpoint(tmp_path_factory.mktemp("learned"), config)
    model = tiny.model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ids, said = torch.tensor([tokens]), torch.tensor([mask[1:]]).bool()
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1][said], ids[:, 1:][said])
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder, model, tokens, mask


def test_an_agent_on_the_torch_engine(lab, learned):
    folder, model, tokens, mask = learned
    chat = tiny.chat_format(installed())
    context = tiny.engine_context(installed(), model.config, folder)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=100, stop_token_ids=chat.stop_token_ids)
    prompt = Prompt("set:0", "set", text=QUESTION, tokens=chat.render_text(QUESTION))

    async def main():
        engine = installed().build("rollout_engines", Spec(name="torch"), context=context)
        await engine.start()
        try:
            generate = lab.build(asking())
            return await generate(
                GenerateContext(engine.generate, chat, sampling), Sample.begin(prompt, id=0, group_id=0)
            )
        finally:
            await engine.close()

    sample = asyncio.run(main())
    assert sample.metadata["answer"] == "It is 19."
    assert json.dumps(results(sample)) == '["19"]'
    assert (sample.tokens, sample.loss_mask.tolist()) == (tokens, mask)
    expected = tiny.log_probs_of(model, tokens).numpy() * np.array(mask)
    assert np.allclose(sample.columns["rollout_log_probs"], expected, atol=1e-4)
    assert (sample.columns["weight_version"] == np.where(mask, 0, -1)).all()
