"""What an agent is called with, what it may return, and what becomes of one that fails."""

import asyncio
import inspect
import threading

import openai
import pytest

from miles.api import ConfigError, EngineError, EngineLostError, PluginLoadError, SamplingParams, Status
from miles.testing.contract import installed


def test_an_agent_is_called_as_in_miles(lab):
    calls = []

    async def agent(base_url, prompt, request_kwargs, metadata, **kw):
        calls.append((prompt, request_kwargs, metadata, kw))
        metadata["spoilt"] = prompt.append("spoilt")
        await lab.ask(base_url, lab.messages, **request_kwargs)

    engine = lab.Lines("hello you")
    tools = [{"type": "function", "function": {"name": "add"}}]
    prompt = {"metadata": {"row": 7}, "label": "you", "tools": tools}
    sampling = SamplingParams(0.7, 0.9, max_new_tokens=20, stop=("END",), stop_token_ids=engine.chat.stop_token_ids)
    (sample,) = lab.run(agent, engine, prompt=prompt, sampling=sampling)
    ((given, kwargs, metadata, more),) = calls
    assert given[:1] == lab.messages
    assert kwargs == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 20, "stop": ["END"]}
    assert metadata["row"] == 7
    assert more == {"tools": tools, "label": "you", "api_key": "none", "sample_id": sample.id, "evaluation": False}
    assert (sample.prompt.messages, sample.prompt.metadata) == (lab.messages, {"row": 7}), "agents have copies"
    (request,) = engine.requests
    assert request.sampling == sampling
    assert (sample.status, sample.text, sample.reward) == (Status.COMPLETED, "hello you", None)


def test_it_may_say_what_it_takes(lab):
    async def agent(base_url, prompt, request_kwargs, metadata, label):
        await lab.ask(base_url, prompt)
        return {"label": label}

    (sample,) = lab.run(agent, prompt={"label": 4})
    assert sample.metadata == {"label": 4}


def test_a_reward_and_whatever_else_is_kept(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        return {"reward": 1, "tests_passed": 3}

    (sample,) = lab.run(agent)
    assert (sample.reward, sample.reward_parts, sample.metadata) == (1.0, {"agent": 1.0}, {"tests_passed": 3})


def test_what_is_no_coroutine_runs_in_a_thread(lab):
    threads = set()

    def agent(base_url, prompt, request_kwargs, metadata):
        threads.add(threading.current_thread())
        blocking = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
        return {"said": blocking.chat.completions.create(model="any", messages=prompt).choices[0].message.content}

    (sample,) = lab.run(agent)
    assert (sample.status, sample.metadata) == (Status.COMPLETED, {"said": "hello you"})
    assert threading.main_thread() not in threads


def test_an_agent_may_be_an_object(lab):
    class Asks:
        async def __call__(self, base_url, prompt, request_kwargs, metadata):
            await lab.ask(base_url, prompt)

    assert lab.run(Asks())[0].status is Status.COMPLETED


def test_an_agent_written_for_miles_adds_v1_itself(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(f"{base_url}/v1", prompt)

    assert lab.run(agent)[0].status is Status.COMPLETED


# ------------------------------------------------------------------------------------------------------------- failing


def test_an_agent_that_raises_fails_with_its_error_and_place(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        raise KeyError("no such page")

    (sample,) = lab.run(agent)
    _, line = inspect.getsourcelines(agent)
    assert sample.status is Status.FAILED
    assert "KeyError: 'no such page'" in sample.error
    assert f"{__file__}:{line + 2}" in sample.error
    assert f"{__file__}:{line})" in sample.error, "it says which agent that is"
    assert sample.response_length > 0, "what was said is kept for people"


def test_an_agent_that_asks_nothing_fails_and_says_so(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        return {"reward": 1.0}

    (sample,) = lab.run(agent)
    assert (sample.status, sample.reward) == (Status.FAILED, None)
    assert "it made no request" in sample.error


def test_an_agent_that_got_no_answer_fails_with_the_reason(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        with pytest.raises(openai.BadRequestError):
            await lab.ask(base_url, prompt, n=2)

    (sample,) = lab.run(agent)
    assert sample.status is Status.FAILED
    assert "no request that was answered: n: " in sample.error


@pytest.mark.parametrize("answer", ["done", 1.0, {"reward": "high"}, {"reward": float("nan")}])
def test_an_answer_that_means_nothing_fails(lab, answer):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        return answer

    (sample,) = lab.run(agent)
    assert (sample.status, sample.reward) == (Status.FAILED, None)
    assert "is expected" in sample.error


def test_what_cannot_be_copied_is_no_metadata(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        return {"reward": 1.0, "lock": threading.Lock()}

    (sample,) = lab.run(agent)
    assert sample.status is Status.FAILED
    assert sample.error.endswith("it returned metadata that cannot be copied: cannot pickle '_thread.lock' object")


def test_a_client_that_does_not_wait_is_the_reason(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        with pytest.raises(openai.APITimeoutError):
            async with lab.client(base_url, timeout=0.2) as client:
                await client.chat.completions.create(model="any", messages=prompt)
        await asyncio.sleep(0.2)

    async def never(request):
        await asyncio.sleep(60)

    (sample,) = lab.run(agent, generate=never)
    assert sample.status is Status.FAILED
    assert sample.error.endswith("no request that was answered: its client did not wait for the answer")


def test_an_agent_that_takes_too_long_fails(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        await asyncio.sleep(60)

    (sample,) = lab.run(agent, options={"timeout": 0.2})
    assert sample.status is Status.FAILED
    assert "longer than timeout=0.2 seconds" in sample.error


def test_a_time_limit_of_the_agents_own_is_its_own_error(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        raise TimeoutError("no page in 5 seconds")

    (sample,) = lab.run(agent, options={"timeout": 30})
    assert sample.status is Status.FAILED
    assert "TimeoutError: no page in 5 seconds" in sample.error


def test_threads_that_hang_hold_up_neither_other_agents_nor_the_end(lab):
    hang, threads = threading.Event(), []

    def agent(base_url, prompt, request_kwargs, metadata):
        threads.append(threading.current_thread())
        openai.OpenAI(base_url=base_url, api_key="none").chat.completions.create(model="any", messages=prompt)
        if prompt != lab.messages:
            hang.wait(60)

    async def main():
        engine = lab.Lines()
        function = lab.build(agent, threads=1, timeout=2)
        prompts = [[{"role": "user", "content": "hang"}], lab.messages]
        return [await function(lab.context(engine), lab.sample(engine, messages)) for messages in prompts]

    hanging, other = asyncio.run(main())
    assert (hanging.status, other.status) == (Status.FAILED, Status.COMPLETED)
    assert threads[0].is_alive()
    assert all(thread.daemon for thread in threads)
    hang.set()


def test_engines_that_fail_are_the_cause_and_not_the_agent(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)

    with pytest.raises(EngineError, match="no memory"):
        lab.run(agent, lab.Lines((EngineError("no memory"), "")))
    with pytest.raises(ValueError, match="odd"):
        lab.run(agent, lab.Lines((ValueError("odd"), "")))


def test_an_agent_may_get_over_an_engine_that_failed_once(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        async with lab.client(base_url, max_retries=1) as client:
            await client.chat.completions.create(model="any", messages=prompt)

    (sample,) = lab.run(agent, lab.Lines((EngineError("a moment"), ""), "hello you"))
    assert (sample.status, sample.text) == (Status.COMPLETED, "hello you")


def test_no_agent_makes_up_for_a_lost_engine(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        with pytest.raises(openai.InternalServerError):
            await lab.ask(base_url, prompt)
        return {"reward": 1.0}

    with pytest.raises(EngineLostError):
        lab.run(agent, lab.Lines((EngineLostError("gone"), "")))


def test_a_cancelled_sample_ends_its_agent_and_its_session(lab):
    heard = []

    async def agent(base_url, prompt, request_kwargs, metadata):
        heard.append(base_url)
        try:
            await asyncio.sleep(60)
        finally:
            heard.append("ended")

    async def main():
        engine = lab.Lines()
        work = asyncio.create_task(lab.build(agent)(lab.context(engine), lab.sample(engine)))
        while not heard:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        with pytest.raises(openai.NotFoundError):
            await lab.ask(heard[0], lab.messages)

    asyncio.run(main())
    assert heard[1] == "ended"


# ------------------------------------------------------------------------------------------------------------- options


def test_a_function_that_is_no_agent_is_refused(lab):
    async def agent(base_url, prompt):
        pass

    with pytest.raises(ConfigError, match="no parameter 'request_kwargs'"):
        lab.build(agent)
    with pytest.raises(ConfigError, match="cannot be called"):
        lab.build(3)

    async def wants_more(base_url, prompt, request_kwargs, metadata, label, browser):
        pass

    with pytest.raises(ConfigError, match="label, metadata, .*, it is missing a required .*'browser'; write"):
        lab.build(wants_more)


def test_agents_are_looked_at_before_anything_is_built():
    kind = installed().component("generate_functions", "agent").options
    with pytest.raises(PluginLoadError, match="cannot import nobody"):
        kind("nobody:agent").preflight()
    with pytest.raises(ConfigError, match=r"agent json:dumps .*it is missing a required .*'obj'; write \(base_url"):
        kind("json:dumps").preflight()


def test_functions_are_named_with_a_dot_too():
    kind = installed().component("generate_functions", "agent").options
    assert kind("package.module.agent").target == "package.module:agent"
    assert kind("package.module:Agents.one").target == "package.module:Agents.one"


def test_a_host_for_others_needs_a_key(lab, monkeypatch):
    async def agent(base_url, prompt, request_kwargs, metadata, api_key):
        assert base_url.startswith("http://localhost:")
        with pytest.raises(openai.AuthenticationError):
            await lab.ask(base_url, prompt)
        async with lab.client(base_url, api_key=api_key) as client:
            await client.chat.completions.create(model="any", messages=prompt)

    options = {"host": "0.0.0.0", "address": "localhost", "api_key_variable": "GATEWAY_KEY"}
    monkeypatch.delenv("GATEWAY_KEY", raising=False)
    with pytest.raises(ConfigError, match="GATEWAY_KEY is not set"):
        lab.build(agent, **options)
    monkeypatch.setenv("GATEWAY_KEY", "secret")
    assert lab.run(agent, options=options)[0].status is Status.COMPLETED


def test_each_task_set_has_its_own_name_for_the_server(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)
        return {"url": base_url}

    async def main():
        engine = lab.Lines()
        builds = [lab.build(agent, **options) for options in ({"address": "localhost"}, {})]
        return [await function(lab.context(engine), lab.sample(engine)) for function in builds]

    named, plain = (sample.metadata["url"] for sample in asyncio.run(main()))
    port = plain.removeprefix("http://127.0.0.1:").partition("/")[0]
    assert named.startswith(f"http://localhost:{port}/sessions/")


def test_a_port_that_is_taken_is_an_error_that_says_so(lab):
    async def agent(base_url, prompt, request_kwargs, metadata):
        await lab.ask(base_url, prompt)

    async def main():
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        engine = lab.Lines()
        function = lab.build(agent, port=port)
        with pytest.raises(ConfigError, match=rf"host 127.0.0.1, port {port}: cannot listen there"):
            await function(lab.context(engine), lab.sample(engine))
        server.close()
        await server.wait_closed()
        assert (await function(lab.context(engine), lab.sample(engine))).status is Status.COMPLETED, "it is free again"

    asyncio.run(main())
