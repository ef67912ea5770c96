"""Conversations that go on, and conversations that branch: what becomes of the tokens."""

import asyncio
import json
import random

import pytest

from miles.api import Status

ROUTED = "rollout_routed_experts"


def user(text):
    return {"role": "user", "content": text}


def accounts(samples, engine):
    """What must hold for the samples of any session: every token that the engine produced is trained on once, with the
    log-prob that it was drawn with, after the very tokens that the engine was given."""
    trained = []
    for sample in samples:
        for name, column in sample.columns.items():
            assert len(column) == sample.specs[name].rows(len(sample.tokens)), name
        log_probs = sample.columns["rollout_log_probs"]
        produced = sample.columns["weight_version"] == 3
        assert not (sample.loss_mask.astype(bool) & ~produced).any()
        assert ((log_probs != 0) == produced).all()
        trained += [round(float(value), 3) for value in log_probs[sample.loss_mask == 1]]
        for turn in sample.turns:
            assert sample.tokens[: turn.end] in engine.streams
            assert produced[turn.start : turn.end].all()
        assert sum(turn.end - turn.start for turn in sample.turns) == produced.sum()
        assert not produced[: sample.prompt_length].any()
    assert sorted(trained, reverse=True) == [round(-0.001 * (i + 1), 3) for i in range(engine.produced)]
    assert len({(sample.rollout_id, sample.group_id) for sample in samples}) == 1


def test_a_conversation_that_goes_on_is_one_sample(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        for text in ("one", "two", "three"):
            await lab.say(base_url, prompt)
            prompt.append(user(text))

    engine = lab.Lines("hell", "o", "you")
    samples = lab.run(agent, engine, routed_experts=True)
    (sample,) = samples
    accounts(samples, engine)
    assert sample.tokens == engine.streams[-1]
    assert len(sample.turns) == 3
    whole = [*lab.messages, *({"role": "assistant", "content": "hell"}, user("one"))]
    whole += [{"role": "assistant", "content": "o"}, user("two"), {"role": "assistant", "content": "you"}]
    assert sample.messages == whole
    assert sample.tokens == engine.chat.render_prompt(whole[:-1]) + engine.chat.render_text("you") + [
        engine.chat.stop_token_ids[0]
    ]
    assert sample.columns[ROUTED][:, 0, 0].tolist() == [token % 250 for token in sample.tokens[:-1]]
    assert [request.routed_experts_from for request in engine.requests[1:]] == [t.end - 1 for t in sample.turns[:-1]]
    assert all(turn.environment_seconds > 0 for turn in sample.turns[:-1])
    assert {request.seed for request in engine.requests} == {sample.seed}


def test_what_was_said_is_never_tokenised_again(lab):
    """`hell` and `o` in two tokens would be one if the text were encoded again."""

    async def agent(base_url, prompt, request_kwargs, metadata):
        assert await lab.say(base_url, prompt) == "hello"
        prompt.append(user("again"))
        await lab.say(base_url, prompt)

    engine = lab.Lines()
    hell, o = engine.chat.render_text("hell")[0], engine.chat.render_text("o")[0]
    spelt = [hell, o, engine.chat.stop_token_ids[0]]
    engine.chat.render_text = lambda text: spelt[:2]
    (sample,) = samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert [sample.tokens[turn.start : turn.end] for turn in sample.turns] == [spelt, spelt]


def test_sub_agents_are_siblings(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        helper = [user("somebody else's question")]
        await asyncio.gather(lab.say(base_url, helper), lab.say(base_url, [user("and another")]))
        prompt.append(user(helper[-1]["content"]))
        await lab.say(base_url, prompt)
        return {"reward": 2.0, "helpers": 2}

    engine = lab.Lines("main", "first", "second", "done")
    samples = lab.run(agent, engine, prompt={"metadata": {}})
    accounts(samples, engine)
    assert [len(sample.turns) for sample in samples] == [2, 1, 1]
    assert [sample.reward for sample in samples] == [2.0] * 3
    assert [sample.metadata for sample in samples] == [{"helpers": 2}] * 3
    assert {sample.text for sample in samples} == {samples[0].text}
    assert samples[0].text.endswith("done")
    assert samples[1].messages[0] == user("somebody else's question")


def test_an_edited_history_is_a_branch(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        prompt.append(user("go on"))
        edited = json.loads(json.dumps(prompt))
        edited[1]["content"] = "not what it said"
        await lab.say(base_url, prompt)
        await lab.say(base_url, edited)

    engine = lab.Lines("one", "two", "three")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert [len(sample.turns) for sample in samples] == [2, 1]
    words = samples[1].tokens[: samples[1].prompt_length]
    assert "not what it said" in engine.chat.decode(words), "what the model did not say is its prompt"


def test_going_on_from_an_earlier_turn_shares_what_was_said_till_then(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        other = [*prompt, user("right")]
        await lab.say(base_url, [*prompt, user("left")])
        await lab.say(base_url, other)
        await lab.say(base_url, [*other, user("on")])

    engine = lab.Lines("one", "two", "three", "four")
    left, right = samples = lab.run(agent, engine, routed_experts=True)
    accounts(samples, engine)
    assert (len(left.turns), len(right.turns)) == (2, 3)
    shared = left.turns[0].end
    assert left.tokens[:shared] == right.tokens[:shared]
    assert (left.loss_mask[:shared].sum(), right.loss_mask[:shared].sum()) == (shared - left.turns[0].start, 0)
    for sample in samples:
        assert sample.columns[ROUTED][:, 0, 0].tolist() == [token % 250 for token in sample.tokens[:-1]]


def test_asking_again_is_another_draw(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, list(prompt))
        await asyncio.gather(lab.say(base_url, list(prompt)), lab.say(base_url, list(prompt)))

    engine = lab.Lines("one", "two", "three")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert len(samples) == 3
    assert len({request.seed for request in engine.requests}) == 3
    again = lab.Lines("one", "two", "three")
    lab.run(agent, again)
    assert {r.seed for r in again.requests} == {r.seed for r in engine.requests}, "and the same in the next run"
    assert len({request.id for request in engine.requests}) == 3


def test_two_requests_at_once_on_one_conversation(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        await asyncio.gather(*(lab.say(base_url, [*prompt, user(text)]) for text in ("a", "bb", "ccc")))

    engine = lab.Lines("one", "two", "three", "four")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert sorted(len(sample.turns) for sample in samples) == [2, 2, 2]


def test_a_summary_that_replaces_the_history(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        for text in ("one", "two"):
            await lab.say(base_url, prompt)
            prompt.append(user(text))
        summary = await lab.say(base_url, [*prompt, user("sum up")])
        await lab.say(base_url, [user(f"so far: {summary}"), user("go on")])

    engine = lab.Lines("a", "b", "all of it", "end")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert [len(sample.turns) for sample in samples] == [3, 1]


def test_what_clients_do_to_messages_is_no_branch(lab):
    """They leave reasoning out, strip white space, give calls other ids, and write arguments their own way."""
    call = '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": [1]}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "add"}}]

    async def agent(base_url, prompt, request_kwargs, metadata):
        message = (await lab.ask(base_url, prompt, tools=tools)).choices[0].message
        assert (message.content, message.reasoning_content) == (" I will add", "hm")
        function = {"name": "add", "arguments": '{"a":[1],"b":2}'}
        calls = [{"id": "mine", "type": "function", "function": function}]
        prompt.append({"role": "assistant", "content": "I will add ", "tool_calls": calls})
        prompt.append({"role": "tool", "tool_call_id": "mine", "content": "3"})
        await lab.say(base_url, prompt, tools=tools)

    engine = lab.Lines(f"<think>\nhm\n</think>\n I will add\n{call}", "3 it is")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert len(samples) == 1


def test_without_a_choice_of_tools_the_conversation_goes_on(lab):
    tools = [{"type": "function", "function": {"name": "add"}}]

    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt, tools=tools)
        prompt.append(user("now in words"))
        await lab.say(base_url, prompt, tools=tools, tool_choice="none")

    engine = lab.Lines("one", "two")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert len(samples) == 1


def test_other_tools_are_another_prompt(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        for name in ("add", "subtract"):
            await lab.say(base_url, prompt, tools=[{"type": "function", "function": {"name": name}}])
            prompt.append(user("go on"))

    engine = lab.Lines("one", "two")
    samples = lab.run(agent, engine)
    accounts(samples, engine)
    assert len(samples) == 2


def test_an_answer_that_nobody_waits_for_leaves_no_trace(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        prompt.append(user("go on"))
        waiting = asyncio.create_task(lab.say(base_url, list(prompt)))
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.sleep(0.3)
        await lab.say(base_url, prompt)

    engine = lab.Lines("one", "two")
    answers = engine.__call__

    async def slow(request):
        if len(engine.requests) == 1 and not slow.hung:
            slow.hung = True
            await asyncio.sleep(60)
        return await answers(request)

    slow.hung = False
    samples = lab.run(agent, engine, generate=slow)
    assert slow.hung
    accounts(samples, engine)
    assert [len(sample.turns) for sample in samples] == [2]


def test_requests_that_outlive_their_agent_end(lab):
    left = []

    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        left.append(asyncio.create_task(lab.say(base_url, [user("later")])))
        await asyncio.sleep(0.3)

    engine = lab.Lines("one", "two")
    answers = engine.__call__

    async def slow(request):
        if engine.requests:
            await asyncio.sleep(60)
        return await answers(request)

    async def main():
        result = await lab.build(agent)(lab.context(engine, generate=slow), lab.sample(engine))
        with pytest.raises(Exception, match="is not open"):
            await left[0]
        return result

    sample = asyncio.run(main())
    assert (sample.status, len(sample.turns)) == (Status.COMPLETED, 1)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_an_agent_does_every_token_is_trained_once(lab, seed):
    draw = random.Random(seed)

    async def agent(base_url, prompt, request_kwargs, metadata):
        conversations = [list(prompt)]

        async def step():
            messages = json.loads(json.dumps(draw.choice(conversations)))
            move = draw.random()
            if move < 0.2:
                messages = messages[: draw.randrange(1, len(messages) + 1)]
            elif move < 0.3:
                messages[draw.randrange(len(messages))]["content"] = "edited"
            elif move < 0.4:
                messages = [user(f"afresh {draw.randrange(2)}")]
            messages.append(user(draw.choice(["go on", "what?", "hello"])))
            await lab.say(base_url, messages)
            conversations.append(messages)

        for _ in range(8):
            await asyncio.gather(*(step() for _ in range(draw.randrange(1, 4))))

    engine = lab.Lines(*(draw.choice(["hello", "you", "hell", "o o", " hm "]) for _ in range(40)))
    samples = lab.run(agent, engine, routed_experts=True)
    accounts(samples, engine)
    assert len(samples) > 2
    for sample in samples:
        assert sample.columns[ROUTED][:, 0, 0].tolist() == [token % 250 for token in sample.tokens[:-1]]
