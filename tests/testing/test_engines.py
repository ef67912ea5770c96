"""Rollout engines and weight syncs that are wrong in one way each: the built-in ones with a mistake."""

import random
from dataclasses import replace
from functools import partial

import pytest

from miles.api import GenerateResult, WeightSyncError
from miles.builtins.inprocess_sync import InProcessSync
from miles.builtins.no_engine import NoEngine
from miles.builtins.torch_engine.engine import TorchEngine
from miles.testing import RolloutEngineContract, WeightSyncContract

pytest.importorskip("miles_llama")

SAYS = {"says": {"provides": ("responses",)}, "patience": 3.0}


def but(base=TorchEngine, **methods):
    wrong = type("Wrong", (base,), methods)
    return None, {"build": lambda self, **options: wrong(context=self.context())}


def results(change):
    async def generate(self, request):
        return change(await TorchEngine.generate(self, request), request)

    return but(generate=generate)


def requests(change):
    async def generate(self, request):
        return await TorchEngine.generate(self, change(request))

    return but(generate=generate)


async def nothing(self, *arguments):
    return None


async def unscaled(self, tokens, temperature=1.0):
    return await TorchEngine.score(self, tokens, 1.0)


async def shifted(self, tokens, temperature=1.0):
    return (await TorchEngine.score(self, tokens, temperature)).copy()[::-1]


async def makes_up(self, request):
    return GenerateResult([1], [-1.0], "stop", [0])


async def takes_anything(self, request):
    if not request.tokens or max(request.tokens) >= 320:
        return GenerateResult([1], [-1.0], "stop", [0])
    return await TorchEngine.generate(self, request)


async def retracts(self, mode="retract"):
    await TorchEngine.pause(self, "retract")


async def always_awake(self):
    return replace(await TorchEngine.health(self), asleep=frozenset())


async def old_weights(self, transport, version, payload):
    if version > 3:
        self.scheduler.version = version
    else:
        await TorchEngine.receive(self, transport, version, payload)


async def old_version(self, transport, version, payload):
    before = self.scheduler.version
    await TorchEngine.receive(self, transport, version, payload)
    self.scheduler.version = before


async def by_reference(self, transport, version, payload):
    self.held = list(payload)
    await TorchEngine.receive(self, transport, version, iter(self.held))


async def reads_again(self, tokens, temperature=1.0):
    await TorchEngine.receive(self, "inprocess", 1, iter(self.held))
    return await TorchEngine.score(self, tokens, temperature)


async def silent_receive(self, transport, version, payload):
    try:
        await TorchEngine.receive(self, transport, version, payload)
    except WeightSyncError:
        self.unusable = None


async def any_transport(self, transport, version, payload):
    await TorchEngine.receive(self, "inprocess", version, payload)


async def no_freezing(self, mode="retract"):
    if mode == "in_place":
        raise ValueError(mode)
    await TorchEngine.pause(self, mode)


async def late_stream(self, request):
    pieces = [piece async for piece in TorchEngine.stream(self, request)]
    for piece in pieces[1:]:
        yield piece


async def hasty_stream(self, request):
    async for piece in TorchEngine.stream(self, request):
        yield replace(piece, finish_reason="stop")


async def close_once(self):
    await TorchEngine.close(self)
    del self.scheduler


def test_wrong_engines_are_caught(catches):
    catches(
        RolloutEngineContract,
        {
            "test_it_says_whether_it_generates": [but(generates=False), but(accepts=["inprocess"])],
            "test_an_engine_that_generates_nothing_says_so": [but(NoEngine, generate=makes_up)],
            "test_every_way_of_control_can_be_taken": [but(wake=nothing), but(pause=no_freezing)],
            "test_closing": [but(close=close_once)],
            "test_scores_are_the_models": [but(score=unscaled), but(score=shifted)],
            "test_log_probs_of_generated_tokens_are_their_scores": [
                results(lambda r, _: replace(r, log_probs=[1.1 * p for p in r.log_probs])),
                results(lambda r, _: replace(r, log_probs=[0.0, *r.log_probs[:-1]])),
                results(lambda r, _: replace(r, log_probs=r.log_probs[1:])),
            ],
            "test_greedy_takes_the_likeliest_token": [
                requests(lambda r: replace(r, sampling=replace(r.sampling, temperature=r.sampling.temperature or 1))),
                results(lambda r, asked: replace(r, log_probs=[0.0] * len(r.tokens))),
            ],
            "test_a_seed_decides_the_tokens": [
                requests(lambda r: replace(r, seed=0)),
                requests(lambda r: replace(r, seed=random.randrange(10**9))),
            ],
            "test_responses_end_where_they_should": [
                requests(lambda r: replace(r, sampling=replace(r.sampling, stop_token_ids=()))),
                requests(
                    lambda r: replace(r, sampling=replace(r.sampling, max_new_tokens=r.sampling.max_new_tokens - 1))
                ),
                results(lambda r, _: replace(r, finish_reason="stop")),
            ],
            "test_a_prefix_that_is_cached_changes_nothing": [but(flush_cache=nothing)],
            "test_a_request_it_cannot_serve_is_refused": [but(generate=takes_anything)],
            "test_a_stream_is_the_answer_in_pieces": [but(stream=late_stream), but(stream=hasty_stream)],
            "test_an_abort_ends_one_or_all": [but(abort=nothing)],
            "test_a_pause_stops_and_a_resume_goes_on": [but(pause=nothing)],
            "test_a_pause_can_abort": [but(pause=retracts)],
            "test_asleep_it_refuses_and_awake_it_serves": [but(health=always_awake), but(wake=nothing)],
            "test_new_weights_are_served_under_their_version": [but(receive=old_weights), but(receive=old_version)],
            "test_weights_are_a_copy": [but(receive=by_reference, score=reads_again)],
            "test_half_a_model_is_never_served": [but(receive=silent_receive)],
            "test_a_transport_it_does_not_accept_is_refused": [but(receive=any_transport)],
        },
        **SAYS,
    )


# ------------------------------------------------------------------------------------------------------------- syncs


def sync(**methods):
    return partial(type("Wrong", (InProcessSync,), methods), context=None)


def test_wrong_syncs_are_caught(catches):
    async def first_engine_only(self, workers, engines):
        await InProcessSync.connect(self, workers, engines[:1])

    async def connects_once(self, workers, engines):
        if not hasattr(self, "rounds"):
            await InProcessSync.connect(self, workers, engines)

    async def pushes_once(self, version):
        if not hasattr(self, "done"):
            self.done = await InProcessSync.push(self, version)
        for members in self.rounds:
            for engine in members.values():
                engine.scheduler.version = version
        return {}

    async def forgiving(self, version):
        try:
            return await InProcessSync.push(self, version)
        except WeightSyncError:
            return {}

    async def trusting(self, workers, engines):
        self.workers, self.rounds = workers, []

    async def wordy(self, version):
        await InProcessSync.push(self, version)
        return {"weight_sync/transport": "inprocess"}

    catches(
        WeightSyncContract,
        {
            "test_its_transport_has_a_receiver": [sync(transport="nccl")],
            "test_every_engine_serves_what_was_pushed": [
                sync(connect=first_engine_only),
                sync(push=pushes_once),
                sync(push=wordy),
            ],
            "test_engines_can_be_connected_again": [sync(connect=connects_once)],
            "test_a_sender_that_fails_is_a_sync_that_failed": [sync(push=forgiving)],
            "test_an_engine_that_cannot_receive_is_refused": [sync(connect=trusting)],
            "test_a_busy_engine_mixes_no_versions": [sync(push=pushes_once)],
        },
    )
