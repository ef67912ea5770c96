"""Pauses, weights from disk, memory that is given back: in front of one server."""

import asyncio
from pathlib import Path

import pytest
import torch
from fake_server import FakeSGLang
from story import ALL, CHECKPOINT, ask, run, until

from miles.api import EngineError, EngineLostError, WeightSyncError
from miles.toolkit import Shipment


@pytest.fixture
def server():
    return FakeSGLang()


# ------------------------------------------------------------------------------------------------ pausing and weights


def test_retract_continues_under_the_new_weights_and_stamps_each_token(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=80, routed_experts=True)))
        await asyncio.sleep(0.06)
        await engine.pause("retract")
        await engine.receive("disk", 1, CHECKPOINT)
        await engine.resume()
        return await task

    result = run(story, server)
    switch = result.weight_versions.index(1)
    assert 0 < switch < 80
    assert result.weight_versions == [0] * switch + [1] * (80 - switch)
    assert result.log_probs == [-float(v) for v in result.weight_versions]
    assert result.tokens == list(range(103, 183))
    assert result.routed_experts[:, 0, 0].tolist() == list(range(82))
    assert result.finish_reason == "length"
    first, second = server.called("/generate")
    assert second["input_ids"] == first["input_ids"] + result.tokens[:switch]
    assert second["sampling_params"]["max_new_tokens"] == 80 - switch
    assert (first["extra_key"], second["extra_key"]) == ("0", "1")


def test_scores_survive_a_pause(server):
    async def story(engine):
        await engine.pause("retract")
        task = asyncio.create_task(engine.score([7, 8]))
        await asyncio.sleep(0)
        await engine.resume()
        return await task

    assert run(story, server).tolist() == [0.0, -0.5]


def test_scores_that_were_put_back_are_asked_for_again(server):
    async def story(engine):
        server.seconds_a_token = 0.1
        task = asyncio.create_task(engine.score([7, 8], temperature=0.5))
        await until(lambda: server.aborted)
        await engine.pause("retract")
        assert not task.done()
        await engine.resume()
        return await task

    assert run(story, server).tolist() == [0.0, -1.0]
    assert len(server.called("/generate")) == 2


def test_in_place_weights_change_under_a_stream_and_each_chunk_is_stamped(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=60)))
        await asyncio.sleep(0.05)
        await engine.pause("in_place")
        await engine.receive("disk", 1, CHECKPOINT)
        await engine.resume()
        return await task

    result = run(story, server, stream=True)
    switch = result.weight_versions.index(1)
    assert 0 < switch < 60
    assert result.weight_versions == [0] * switch + [1] * (60 - switch)
    assert len(server.called("/generate")) == 1
    assert server.called("/flush_cache") == []


def test_in_place_without_streams_takes_no_weights_under_requests(server):
    """A whole reply carries one version for all its tokens."""

    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=30)))
        await until(lambda: server.aborted)
        await engine.pause("in_place")
        with pytest.raises(WeightSyncError, match="1 requests are running"):
            await engine.receive("disk", 1, CHECKPOINT)
        await engine.resume()
        return await task

    assert run(story, server).weight_versions == [0] * 30


def test_streams_are_refused_where_servers_repeat_themselves():
    with pytest.raises(EngineError, match="incremental-streaming-output"):
        run(lambda engine: engine.health(), FakeSGLang(incremental_streaming_output=False), stream=True)


def test_requests_wait_while_paused_and_an_abort_frees_them(server):
    async def story(engine):
        await engine.pause("abort")
        waiting = asyncio.create_task(engine.generate(ask("1")))
        freed = asyncio.create_task(engine.generate(ask("2")))
        await asyncio.sleep(0.05)
        assert server.called("/generate") == []
        health = await engine.health()
        assert (health.running, health.waiting) == (0, 2)
        await engine.abort("2")
        early = await freed
        await engine.resume()
        return early, await waiting

    early, late = run(story, server)
    assert (early.finish_reason, early.tokens) == ("abort", [])
    assert late.finish_reason == "length"


def test_a_retracted_request_can_still_be_aborted_by_a_pause(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=300)))
        await until(lambda: server.aborted)
        await engine.pause("retract")
        await engine.pause("abort")
        return await task

    assert run(story, server).finish_reason == "abort"


def test_a_flush_puts_running_requests_back_for_as_long(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=80)))
        await until(lambda: server.aborted)
        await engine.flush_cache()
        return await task

    result = run(story, server)
    assert result.tokens == list(range(103, 183))
    assert len(server.called("/generate")) == 2


def test_a_failed_push_makes_the_engine_refuse_until_one_succeeds(server):
    async def story(engine):
        server.fails = True
        with pytest.raises(EngineError, match="no such file"):
            await engine.receive("disk", 1, CHECKPOINT)
        with pytest.raises(EngineError, match=r"version 1 did not complete .*no such file"):
            await engine.generate(ask())
        server.fails = False
        await engine.receive("disk", 1, CHECKPOINT)
        return await engine.generate(ask())

    assert run(story, server).weight_versions == [1] * 4
    assert server.called("/update_weights_from_disk")[0]["model_path"] == str(Path("weight_v1").absolute())


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (Shipment("miles.builtins.disk_sync:read_changes", {"folder": "x"}, changes=True), "--update-weight-mode full"),
        (Shipment("some:thing", {"port": 1}), "folder of a checkpoint"),
        ([{"a": torch.zeros(1)}], "folder of a checkpoint"),
    ],
)
def test_what_it_cannot_receive_leaves_it_as_it_is(server, payload, message):
    async def story(engine):
        with pytest.raises(WeightSyncError, match=message):
            await engine.receive("disk", 1, payload)
        return await engine.generate(ask())

    assert run(story, server).weight_versions == [0] * 4


def test_a_push_to_a_running_engine_is_refused(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=50)))
        await until(lambda: server.aborted)
        with pytest.raises(WeightSyncError, match="pause it"):
            await engine.receive("disk", 1, CHECKPOINT)
        return await task

    assert run(story, server).weight_versions == [0] * 50


def test_weights_that_somebody_else_sent_are_noticed(server):
    async def story(engine):
        server.version = "17"
        assert (await engine.health()).weight_version == -1
        with pytest.raises(EngineLostError, match="version 17, and 0 was sent"):
            await engine.generate(ask())
        await engine.restart()
        await engine.receive("disk", 18, CHECKPOINT)
        return await engine.generate(ask())

    assert run(story, server).weight_versions == [18] * 4


def test_servers_without_a_version_are_called_version_0():
    fresh = FakeSGLang()
    fresh.version = "default"
    assert run(lambda engine: engine.generate(ask()), fresh).weight_versions == [0] * 4


def test_sleeping_by_parts_and_waking_without_weights(server):
    async def story(engine):
        await engine.sleep(frozenset({"weights", "kv_cache"}))
        await engine.sleep(frozenset({"kv_cache"}))
        with pytest.raises(EngineError, match="kv_cache"):
            await engine.generate(ask())
        with pytest.raises(WeightSyncError, match="asleep"):
            await engine.receive("disk", 1, CHECKPOINT)
        await engine.wake(ALL)
        with pytest.raises(EngineError, match="dropped while it slept"):
            await engine.generate(ask())
        await engine.receive("disk", 1, CHECKPOINT)
        return await engine.generate(ask())

    assert run(story, server).weight_versions == [1] * 4
    assert server.called("/release_memory_occupation") == [{"tags": ["kv_cache", "weights"]}]
    assert server.called("/resume_memory_occupation") == [{"tags": ["kv_cache", "weights"]}]


@pytest.mark.parametrize("path", ["/release_memory_occupation", "/resume_memory_occupation"])
def test_when_nobody_knows_what_is_asleep_the_engine_is_lost(server, path):
    """Memory that is released or resumed twice ends a server."""

    async def story(engine):
        async def nap():
            await engine.sleep(ALL)
            await engine.wake(ALL)

        server.breaks.add(path)
        with pytest.raises(EngineLostError, match="may have been done, or not"):
            await nap()
        server.breaks.clear()
        await engine.restart()
        assert (await engine.health()).asleep == frozenset()

    run(story, server)
    assert len(server.called(path)) == 1


def test_weights_that_are_kept_on_the_host_need_no_push():
    async def story(engine):
        await engine.sleep(ALL)
        await engine.wake(ALL)
        return await engine.generate(ask())

    assert len(run(story, FakeSGLang(enable_weights_cpu_backup=True)).tokens) == 4


def test_sleep_needs_a_server_that_can_and_none_of_its_requests(server):
    async def story(engine):
        task = asyncio.create_task(engine.generate(ask(length=50)))
        await until(lambda: server.aborted)
        with pytest.raises(EngineError, match="1 requests are running"):
            await engine.sleep(ALL)
        return await task

    run(story, server)
    with pytest.raises(EngineError, match="--enable-memory-saver"):
        run(lambda engine: engine.sleep(ALL), FakeSGLang(enable_memory_saver=False))
