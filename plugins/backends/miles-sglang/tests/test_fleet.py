"""Several servers, a router, servers that are gone, and an engine's own."""

import asyncio
import base64
import time

import pytest
import torch
from fake_server import FakeSGLang, context, listening
from miles_sglang.affinity import Affinity
from miles_sglang.engine import SGLangEngine
from miles_sglang.options import ExternalOptions, SGLangOptions
from miles_sglang.sender import Sender
from story import CHECKPOINT, ask, run, until

from miles.api import EngineError, EngineLostError


@pytest.fixture
def server():
    return FakeSGLang()


# ----------------------------------------------------------------------------------------------------- several servers


def test_samples_of_a_prompt_and_their_turns_go_to_one_server_and_prompts_to_all():
    fakes = [FakeSGLang(), FakeSGLang()]

    async def story(engine):
        for turn in range(2):  # prompt p has p + 1 tokens and the samples 2 p and 2 p + 1, which grow apart
            asked = [ask(f"{i}.{turn}", prompt=i // 2 + 1 + turn * (i + 50)) for i in range(40)]
            await asyncio.gather(*map(engine.generate, asked))

    run(story, *fakes)
    went = [{int(body["rid"].split(".")[2]) // 2 for body in fake.called("/generate")} for fake in fakes]
    assert went[0] | went[1] == set(range(20))
    assert not went[0] & went[1]
    assert min(map(len, went)) > 3
    assert sum(len(fake.called("/generate")) for fake in fakes) == 80


def test_trajectories_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("miles_sglang.affinity.REMEMBERED", 2)
    affinity = Affinity()
    first = affinity.key("1.0", [1])
    assert affinity.key("1.1", [1, 2, 3]) == first
    affinity.key("2.0", [2])
    affinity.key("3.0", [3])
    assert affinity.key("1.1", [1, 2, 3]) != first
    assert affinity.key("score", [1]) == first


def test_a_router_gets_requests_and_servers_get_control():
    fakes, router = [FakeSGLang(), FakeSGLang()], FakeSGLang()

    async def story(engine):
        await engine.generate(ask())
        await engine.receive("disk", 1, CHECKPOINT)
        await engine.generate(ask(routed_experts=True))

    run(story, *fakes, router=router)
    assert [path for path, _ in router.calls] == ["/generate"], "it would drop what it does not know"
    pushed = ["/update_weights_from_disk", "/update_weight_version", "/flush_cache"]
    for fake in fakes:
        assert [path for path, _ in fake.calls if path != "/generate"] == pushed
    assert sum(len(fake.called("/generate")) for fake in fakes) == 1


def test_no_server_serves_until_all_have_the_weights():
    fakes = [FakeSGLang(), FakeSGLang()]

    async def story(engine):
        fakes[1].fails = True
        with pytest.raises(EngineError, match="no such file"):
            await engine.receive("disk", 1, CHECKPOINT)
        for id in "abcd":
            with pytest.raises(EngineError, match="did not complete"):
                await engine.generate(ask(id))
        fakes[1].fails = False
        await engine.receive("disk", 1, CHECKPOINT)
        return await asyncio.gather(*(engine.generate(ask(id)) for id in "abcd"))

    assert {version for result in run(story, *fakes) for version in result.weight_versions} == {1}


def test_the_shortest_of_several_contexts_counts():
    fakes = FakeSGLang(max_total_num_tokens=900), FakeSGLang(max_total_num_tokens=800)

    async def story(engine):
        return engine.max_len

    assert run(story, *fakes) == 800


def test_servers_that_were_started_differently_are_refused():
    with pytest.raises(EngineError, match="started differently"):
        run(lambda engine: engine.health(), FakeSGLang(), FakeSGLang(enable_memory_saver=False))


# --------------------------------------------------------------------------------------------------- life of an engine


def test_a_server_that_does_not_come_up_is_an_error():
    async def story():
        engine = SGLangEngine(ExternalOptions(urls="localhost:1", start_timeout=0.1), context=context())
        with pytest.raises(EngineError, match=r"no server became healthy at http://localhost:1 within 0.1 s"):
            await engine.start()
        with pytest.raises(EngineError, match="was not started"):
            await engine.generate(ask())
        await engine.close()

    asyncio.run(story())


def test_a_server_that_hangs_is_lost_and_can_be_waited_for(server):
    async def story(engine):
        server.hangs = True
        tasks = [asyncio.create_task(engine.generate(ask(str(i)))) for i in range(3)]
        begun = time.monotonic()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - begun < 5
        assert [type(error) for error in errors] == [EngineLostError] * 3
        with pytest.raises(EngineLostError):
            await engine.health()
        server.hangs = False
        await engine.restart()
        with pytest.raises(EngineError, match="no weights have arrived"):
            await engine.generate(ask())
        await engine.receive("disk", 1, CHECKPOINT)
        return await engine.generate(ask()), (await engine.health()).counts

    result, counts = run(story, server, health_check_interval=0.05, health_check_timeout=0.05)
    assert result.weight_versions == [1] * 4
    assert (counts["lost"], counts["silences"]) == (1, 3)


def test_closing_ends_requests_and_tells_the_servers(server):
    async def story(engine):
        running = asyncio.create_task(engine.generate(ask("1", length=2000)))
        await until(lambda: server.aborted)
        await engine.pause("in_place")
        waiting = asyncio.create_task(engine.generate(ask("2")))
        await asyncio.sleep(0)
        await engine.close()
        for task in (running, waiting):
            with pytest.raises(EngineError, match="was closed"):
                await task
        assert len(server.called("/abort_request")) == 1

    run(story, server)


def test_closing_waits_for_the_word_that_a_request_was_given_up(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=2000)))
        await until(lambda: server.aborted)
        task.cancel()
        await asyncio.sleep(0)
        await engine.close()
        assert len(server.called("/abort_request")) == 1

    run(story, server)


def test_control_that_gets_no_answer_finds_the_server_lost(server, monkeypatch):
    """Said once: what hangs for a minute hangs for three."""
    monkeypatch.setattr(Sender.tell, "__defaults__", (None, 0.1, 3))
    monkeypatch.setattr("miles_sglang.sender.SECOND_LOOKS", (0.01, 0.01))

    async def story(engine):
        server.hangs = True
        with pytest.raises(EngineLostError):
            await engine.pause("in_place")
        assert len(server.called("/pause_generation")) == 1

    run(story, server, health_check_timeout=0.1)


# ---------------------------------------------------------------------------------------------------------- own servers


class Own:
    """What `own_servers` gives, around a server that runs here."""

    def __init__(self, fake):
        self.fake, self.died, self.starts, self.ports = fake, "", 0, True

    @property
    def url(self):
        return self.fake.url

    async def start(self):
        self.died = ""
        self.starts += 1

    def death(self):
        return self.died

    async def stop(self):
        self.died = "it was stopped"

    def close(self):
        self.ports = False


def with_own(story, *fakes, load_weights=True, monkeypatch, **options):
    owned = [Own(fake) for fake in fakes]
    monkeypatch.setattr("miles_sglang.engine.own_servers", lambda options, context: (owned, None))

    async def whole():
        async with asyncio.timeout(20), listening(*fakes):
            made = context(load_weights=load_weights, gpus=2 * len(fakes))
            engine = SGLangEngine(SGLangOptions(**options), context=made)
            await engine.start()
            try:
                return await story(engine, owned)
            finally:
                await engine.close()

    return asyncio.run(whole()), owned


def test_own_servers_get_buckets_a_handle_for_each_rank_then_the_version_then_a_flush(monkeypatch):
    fakes = [FakeSGLang(), FakeSGLang()]

    async def story(engine, owned):
        with pytest.raises(EngineError, match="no weights have arrived"):
            await engine.generate(ask())
        await engine.receive("inprocess", 3, [{"a": torch.ones(4)}, {"b": torch.zeros(2, 2)}])
        return await engine.generate(ask())

    result, owned = with_own(story, *fakes, load_weights=False, monkeypatch=monkeypatch)
    assert result.weight_versions == [3] * 4
    for fake in fakes:
        paths = [path for path, _ in fake.calls if path != "/generate"]
        assert paths == ["/update_weights_from_tensor", "/update_weight_version", "/flush_cache"]
        (body,) = fake.called("/update_weights_from_tensor")
        assert (body["load_format"], body["flush_cache"]) == ("flattened_bucket", False)
        assert len(body["serialized_named_tensors"]) == 2
        assert b"flattened_tensor" in base64.b64decode(body["serialized_named_tensors"][0])
    assert [(own.death(), own.ports) for own in owned] == [("it was stopped", False)] * 2


def test_a_server_of_its_own_that_dies_is_lost_at_once_and_started_again(monkeypatch):
    async def story(engine, owned):
        running = asyncio.create_task(engine.generate(ask(length=2000)))
        await until(lambda: fake.aborted)
        owned[0].died = "SGLang server sglang-0 ended with signal SIGKILL"
        await engine.abort()
        server_url, fake.url = fake.url, "http://127.0.0.1:9"
        with pytest.raises(EngineLostError, match="SIGKILL"):
            await engine.generate(ask("2"))
        fake.url = server_url
        await engine.restart()
        assert owned[0].starts == 2
        await engine.receive("broadcast", 1, [{"a": torch.ones(4)}])
        return await running, await engine.generate(ask("3"))

    fake = FakeSGLang()
    (before, after), _ = with_own(story, fake, monkeypatch=monkeypatch)
    assert before.finish_reason == "abort"
    assert after.weight_versions == [1] * 4


def test_own_servers_are_told_once_to_abort_everything(monkeypatch):
    async def story(engine, owned):
        tasks = [asyncio.create_task(engine.generate(ask(str(i), length=2000))) for i in range(5)]
        await until(lambda: len(fake.aborted) == 5)
        await engine.pause("abort")
        return await asyncio.gather(*tasks)

    fake = FakeSGLang()
    results, _ = with_own(story, fake, monkeypatch=monkeypatch)
    assert {result.finish_reason for result in results} == {"abort"}
    assert fake.called("/abort_request")[0] == {"abort_all": True}
