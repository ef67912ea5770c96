"""What a session takes and refuses, where it ends, and how it gets over aborts."""

import asyncio

import aiohttp
import openai
import pytest

from miles.api import SamplingParams, Status


def user(text):
    return {"role": "user", "content": text}


def refused(lab, engine=None, options=None, context=None, **params):
    """What a client hears of a request, and the sample of its agent, which goes on with another one."""
    heard = []

    async def agent(base_url, prompt, request_kwargs, metadata):
        with pytest.raises(openai.APIStatusError) as error:
            await lab.ask(base_url, prompt, **params)
        heard.append(error.value)
        await lab.ask(base_url, prompt)

    (sample,) = lab.run(agent, engine, options, **(context or {}))
    assert sample.status is Status.COMPLETED
    return heard[0]


# ------------------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 2), ("ignore_eos", True), ("input_ids", [1]), ("chat_template_kwargs", {"enable_thinking": False})],
)
def test_what_cannot_be_trained_is_refused(lab, name, value):
    error = refused(lab, extra_body={name: value})
    assert (error.status_code, error.param, error.code, error.type) == (
        400,
        name,
        "unsupported_value",
        "invalid_request_error",
    )
    assert error.body["message"].startswith(f"{name}: not in a session: ")


def test_what_miles_serve_refuses_is_refused(lab):
    assert refused(lab, tool_choice="required", tools=[]).param == "tool_choice"
    assert refused(lab, frequency_penalty=1.0).param == "frequency_penalty"
    assert refused(lab, extra_body={"temprature": 1.0}).code == "unknown_parameter"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "The body is not JSON"),
        (b"[]", None, "must be a JSON object, not list"),
        (b"{}", "messages", "messages: Field required"),
        (b'{"messages": []}', "messages", "at least 1 item"),
        (
            b'{"messages": ["1", "+", "1", "=", "?"]}',
            "messages.0",
            "messages.2: Input should be an object, not str; and 2",
        ),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "messages.0.role", "Input should be 'system'"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages.0.content", "give text"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', "tools", "function"),
    ],
)
def test_bodies_that_make_no_request(lab, body, param, words):
    """They are the client's errors, in OpenAI's shape, and the session goes on."""

    async def agent(base_url, prompt, request_kwargs, metadata):
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{base_url}/chat/completions", data=body, headers={"Content-Type": "application/json"}) as reply,
        ):
            error = (await reply.json())["error"]
            assert reply.status == 400
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]
        assert (error["param"] or "").startswith(param or "")
        await lab.ask(base_url, prompt)

    (sample,) = lab.run(agent)
    assert (sample.status, sample.error, len(sample.turns)) == (Status.COMPLETED, None, 1)


def test_calls_whose_arguments_are_no_json_are_passed_on_as_text(lab):
    """Some clients send back what they made of half a call."""
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1'}}

    async def agent(base_url, prompt, request_kwargs, metadata):
        result = {"role": "tool", "tool_call_id": "a", "content": "?"}
        await lab.ask(base_url, [*prompt, {"role": "assistant", "content": None, "tool_calls": [call]}, result])

    engine = lab.Lines()
    (sample,) = lab.run(agent, engine)
    assert '"arguments": "{\\"a\\": 1"' in engine.chat.decode(engine.requests[0].tokens)
    assert sample.status is Status.COMPLETED


def test_the_task_set_says_how_tokens_are_drawn(lab, caplog):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt, temperature=0.1, seed=3, top_p=0.5, max_tokens=7, stop=["!"])
        await lab.ask(base_url, [user("again")], max_completion_tokens=1000, temperature=0.9)

    engine = lab.Lines("hello you")
    ends = tuple(engine.chat.stop_token_ids)
    sampling = SamplingParams(0.9, top_k=50, max_new_tokens=20, stop=("END",), stop_token_ids=ends)
    lab.run(agent, engine, sampling=sampling)
    first, second = engine.requests
    assert first.sampling == SamplingParams(0.9, top_k=50, max_new_tokens=7, stop=("END", "!"), stop_token_ids=ends)
    assert second.sampling == sampling
    assert first.seed == 99
    (warning,) = [record.getMessage() for record in caplog.records if "of its own" in record.getMessage()]
    assert "asks for seed, temperature, top_p of its own; the task set's counts" in warning


def test_other_sampling_may_be_refused(lab):
    error = refused(lab, options={"other_sampling": "refuse"}, temperature=0.1)
    assert (error.status_code, error.param) == (400, "temperature")
    assert "the run trains on its own sampling" in error.body["message"]


def test_an_unknown_session_is_not_found(lab):
    heard = []

    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        heard.append(base_url)
        other = base_url.replace(base_url.split("/")[-2], "nobody")
        with pytest.raises(openai.NotFoundError) as error:
            await lab.ask(other, prompt)
        heard.append(error.value)

    async def main():
        engine = lab.Lines()
        await lab.build(agent)(lab.context(engine), lab.sample(engine))
        with pytest.raises(openai.NotFoundError) as error:
            await lab.ask(heard[0], lab.messages)
        heard.append(error.value)

    asyncio.run(main())
    for error in heard[1:]:
        assert (error.code, error.type) == ("session_not_found", "invalid_request_error")
        assert "is not open" in error.body["message"]


def test_models_and_the_session_itself(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        async with lab.client(base_url) as client:
            assert [model.id async for model in client.models.list()] == ["policy"]
        await lab.ask(base_url, prompt)
        await lab.ask(base_url, prompt)
        url = base_url.removesuffix("/v1")
        async with aiohttp.ClientSession() as http:
            async with http.get(url) as reply:
                told = await reply.json()
            assert (told["object"], told["requests"], len(told["branches"])) == ("session", 2, 2)
            assert told["branches"][0]["turns"] == 1
            async with http.delete(url) as reply:
                assert (await reply.json())["deleted"] is True
            async with http.get(url) as reply:
                assert (reply.status, (await reply.json())["error"]["code"]) == (404, "session_not_found")
            async with http.get(url, headers={"Origin": "http://elsewhere"}) as reply:
                assert reply.status == 403
        with pytest.raises(openai.NotFoundError):
            await lab.ask(base_url, prompt)

    assert len(lab.run(agent)) == 2


# -------------------------------------------------------------------------------------------------------------- budget


def test_an_answer_that_is_cut_is_truncated(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        return {"reason": (await lab.ask(base_url, prompt)).choices[0].finish_reason}

    (sample,) = lab.run(agent, lab.Lines("hello hello you"), sampling=SamplingParams(max_new_tokens=3))
    assert (sample.status, sample.metadata["reason"]) == (Status.TRUNCATED, "length")
    assert sample.turns[-1].finish_reason == "length"


@pytest.mark.parametrize(("turns", "status"), [(1, Status.TRUNCATED), (2, Status.FAILED)])
def test_an_agent_that_dies_of_a_turn_that_was_cut_is_truncated(lab, turns, status):
    """Frameworks raise where they cannot read half an answer. What went wrong after a whole one is the agent's."""

    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt, max_tokens=2)
        for _ in range(turns - 1):
            prompt.append(user("go on"))
            await lab.say(base_url, prompt)
        raise ValueError("half an answer")

    (sample,) = lab.run(agent, lab.Lines("hello hello you", "you"))
    assert (sample.status, sample.reward, len(sample.turns)) == (status, None, turns)
    assert "ValueError: half an answer" in sample.error, "people see what the agent said of it"


def test_the_last_turn_decides(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt, max_tokens=2)
        prompt.append(user("go on"))
        await lab.say(base_url, prompt)

    (sample,) = lab.run(agent, lab.Lines("hello hello you", "you"))
    assert [turn.finish_reason for turn in sample.turns] == ["length", "stop"]
    assert sample.status is Status.COMPLETED


@pytest.mark.parametrize("catches", [False, True])
def test_a_conversation_that_fills_the_context_is_truncated(lab, catches):
    """Whether the agent makes something of the error or dies of it: it was the budget that ended it."""
    heard = []

    async def agent(base_url, prompt, request_kwargs, metadata):
        try:
            while True:
                await lab.say(base_url, prompt)
                prompt.append(user("go on"))
        except openai.BadRequestError as error:
            heard.append(error)
            if not catches:
                raise
        return {"reward": 0.5}

    engine = lab.Lines("hello you")
    (sample,) = lab.run(agent, engine, max_context_tokens=100)
    (error,) = heard
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert "maximum context length is 100 tokens" in error.body["message"]
    assert (sample.status, sample.reward) == (Status.TRUNCATED, 0.5 if catches else None)
    assert len(sample.turns) > 1
    assert len(sample.tokens) <= 100
    assert sample.tokens == engine.streams[-1]


def test_a_turn_gets_the_room_that_is_left(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)

    engine = lab.Lines("hello you hello you")
    room = len(engine.chat.render_prompt(lab.messages)) + 4
    (sample,) = lab.run(agent, engine, max_context_tokens=room)
    assert (engine.requests[0].sampling.max_new_tokens, len(sample.tokens)) == (4, room)
    assert sample.status is Status.TRUNCATED


def test_a_first_request_that_does_not_fit_fails(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)

    (sample,) = lab.run(agent, max_context_tokens=5)
    assert sample.status is Status.FAILED
    assert "maximum context length is 5 tokens" in sample.error


def test_an_agent_that_shortens_its_history_goes_on(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.say(base_url, prompt)
        with pytest.raises(openai.BadRequestError):
            await lab.ask(base_url, [*prompt, user("hello " * 100)])
        await lab.say(base_url, [user("short")])

    first, second = lab.run(agent, max_context_tokens=100)
    assert (first.status, second.status) == (Status.TRUNCATED, Status.COMPLETED)


# -------------------------------------------------------------------------------------------------------------- aborts


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_turn_goes_on_and_nobody_notices(lab, stream):
    """As around a change of weights: twice in the middle, once before the first token."""

    async def agent(base_url, prompt, request_kwargs, metadata):
        if not stream:
            choice = (await lab.ask(base_url, prompt)).choices[0]
            return {"said": choice.message.content, "reason": choice.finish_reason}
        async with lab.client(base_url) as client:
            chunks = [c async for c in await client.chat.completions.create(model="any", messages=prompt, stream=True)]
        said = "".join(c.choices[0].delta.content or "" for c in chunks)
        return {"said": said, "reason": chunks[-1].choices[0].finish_reason}

    engine = lab.Lines(("", "weights"), ("hel", "weights"), ("lo y", "weights"), ("ou", "stop"))
    (sample,) = lab.run(agent, engine, routed_experts=True)
    assert (sample.status, sample.metadata) == (Status.COMPLETED, {"said": "hello you", "reason": "stop"})
    assert [request.tokens for request in engine.requests[1:]] == engine.streams[:-1]
    assert [request.sampling.max_new_tokens for request in engine.requests] == [64, 64, 62, 58]
    assert len({request.id for request in engine.requests}) == 4
    (turn,) = sample.turns
    assert (turn.start, turn.end, turn.finish_reason) == (sample.prompt_length, len(sample.tokens), "stop")
    assert sample.columns["rollout_log_probs"][turn.start :].min() == pytest.approx(-0.001 * engine.produced)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_run_that_stops_gets_the_sample_back_and_begins_it_again(lab, blocking, turn):
    """Nobody can put an agent back into the middle of what it does."""
    ended = []

    async def agent(base_url, prompt, request_kwargs, metadata):
        try:
            await lab.say(base_url, prompt)
            prompt.append(user("go on"))
            await lab.say(base_url, prompt)
        finally:
            ended.append(len(prompt))

    def blocking_agent(base_url, prompt, request_kwargs, metadata):
        client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
        for _ in range(2):
            message = client.chat.completions.create(model="any", messages=prompt).choices[0].message
            prompt += [message, user("go on")]

    engine = lab.Lines(*[("hello", "stop")] * (turn - 1), ("hel", "abort"), ("lo", "stop"))

    async def main():
        function = lab.build(blocking_agent if blocking else agent)
        sample = await function(lab.context(engine), lab.sample(engine))
        assert sample.status is Status.ABORTED
        assert len(engine.requests) == turn
        assert sample.tokens == engine.streams[-1], "what was said is told"
        sample.status = Status.PENDING
        return sample, await function(lab.context(lab.Lines("you")), sample)

    aborted, again = asyncio.run(main())
    assert (again.status, again.metadata, len(again.turns)) == (Status.COMPLETED, {"restarted": 1}, 2)
    assert [part.finish_reason for part in aborted.turns] == ["stop"] * (turn - 1) + ["abort"]
    assert (aborted.id, again.id) == (5, 5)
    assert ended == ([] if blocking else [2 * turn - 1, 4])


def test_an_agent_that_makes_an_error_of_its_end_is_stopped_all_the_same(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        try:
            await lab.say(base_url, prompt)
        except asyncio.CancelledError:
            raise RuntimeError("interrupted") from None

    async def main():
        engine = lab.Lines(("hel", "abort"))
        sample = await lab.build(agent)(lab.context(engine), lab.sample(engine))
        return sample.status, asyncio.current_task().cancelling()

    assert asyncio.run(main()) == (Status.ABORTED, 0), "nothing of it is left for whoever runs the next agent"


def test_versions_of_weights_are_those_of_each_token(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)

    engine = lab.Lines(("hel", "weights"), ("lo", "stop"))

    async def changing(request):
        result = await engine(request)
        result.weight_versions = [len(engine.requests)] * len(result.tokens)
        return result

    (sample,) = lab.run(agent, engine, generate=changing)
    assert sample.columns["weight_version"][sample.prompt_length :].tolist() == [1, 1, 2, 2, 2]


# -------------------------------------------------------------------------------------------------------- many at once


def test_sessions_do_not_meet(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        for _ in range(3):
            said = await lab.say(base_url, prompt)
            assert said == prompt[0]["content"]
            prompt.append(user("go on"))
        return {"reward": float(prompt[0]["content"])}

    async def main():
        engine = lab.Lines()
        function = lab.build(agent)

        async def one(number):
            echo = lab.Lines(str(number), chat=engine.chat)
            return await function(lab.context(echo), lab.sample(echo, [user(str(number))]))

        return await asyncio.gather(*map(one, range(40)))

    samples = asyncio.run(main())
    assert [sample.reward for sample in samples] == [float(number) for number in range(40)]
