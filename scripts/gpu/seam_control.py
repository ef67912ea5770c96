"""The checks of `seam_sglang.py` that change what a server does: pushes of weights, aborts, sleep, sudden ends.

Weights served, in order: `seeded` has none before `first_push`, then dense-1, -2, -1; `dense` dense-1, -2, -1, -2;
`moe` moe-1, -2, -1. The last check ends servers on purpose.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from seam_checks import VOCABULARY, answer, distance, many, plain, prompt, raw, rounding

from miles.errors import EngineError
from miles.types import GenerateRequest, GenerateResult, SamplingParams

if TYPE_CHECKING:
    from seam_sglang import Lab

SKIPPED = "model.layers.1.mlp.down_proj.weight"


async def first_push(lab: Lab) -> dict[str, Any]:
    """A server started with `--load-format dummy` serves the real weights after its first push."""
    engine, reference = lab.engines["seeded"], lab.reference("dense-1").log_probs
    before = distance(await many(engine, 8, 32, "dummy"), reference)
    begun = time.perf_counter()
    await engine.receive("cuda_ipc", 1, lab.trainer.buckets(lab.directory / "dense-1"))
    seconds = time.perf_counter() - begun
    after = distance(await many(engine, 8, 32, "real"), reference)
    return {"before": before, "after": after, "seconds": round(seconds, 3)}


async def push_over_cuda_ipc(lab: Lab) -> dict[str, Any]:
    """Version 2 from another process; then version 3 without one tensor; then version 4, whole again."""
    engine, figures = lab.engines["dense"], dict[str, Any]()
    greedy = GenerateRequest("greedy", prompt(9, 32), SamplingParams(temperature=0.0, max_new_tokens=48))
    old, again = await engine.generate(greedy), await engine.generate(greedy)
    figures["cached tokens of a repeated prompt of 32"] = again.cached_tokens
    for mib in (64, 8):
        begun = time.perf_counter()
        await engine.receive("cuda_ipc", 2, lab.trainer.buckets(lab.directory / "dense-2", mib=mib))
        figures[f"seconds, buckets of {mib} MiB"] = round(time.perf_counter() - begun, 3)
    new = await engine.generate(greedy)
    figures["cached tokens after the push"] = new.cached_tokens
    figures["greedy tokens agree with the old weights' until"] = next(
        (i for i, (a, b) in enumerate(zip(old.tokens, new.tokens, strict=False)) if a != b), "the end"
    )
    figures["versions stamped"] = [old.weight_versions[0], new.weight_versions[0]]
    pairs = await many(engine, 16, 128, "v2")
    for dtype in ("bfloat16", "float32"):
        figures[f"against the new weights, {dtype}"] = distance(pairs, lab.reference("dense-2", dtype).log_probs)
    figures["transformers bfloat16 against float32"] = rounding(lab, "dense-2", pairs)
    figures["against the old weights"] = distance(pairs, lab.reference("dense-1").log_probs)
    await engine.receive("cuda_ipc", 3, lab.trainer.buckets(lab.directory / "dense-1", skip=(SKIPPED,)))
    figures["one tensor of version 3 skipped: accepted, version"] = (await engine.health()).weight_version
    figures["one tensor skipped, against version 3"] = distance(
        await many(engine, 16, 128, "v3"), lab.reference("dense-1").log_probs
    )
    unknown = lab.trainer.buckets(lab.directory / "dense-2", extra={"model.layers.1.mlp.typo.weight": [4, 4]})
    await engine.receive("cuda_ipc", 4, unknown)
    figures["unknown tensor name: accepted, version"] = (await engine.health()).weight_version
    figures["whole again"] = distance(await many(engine, 16, 128, "v4"), lab.reference("dense-2").log_probs)
    return figures


async def push_from_disk(lab: Lab) -> dict[str, Any]:
    """The MoE model to version 2 from disk and back to the weights of version 1 over CUDA IPC, expert by expert."""
    engine, figures = lab.engines["moe"], dict[str, Any]()
    for transport, version, checkpoint in (("disk", 2, "moe-2"), ("cuda_ipc", 3, "moe-1")):
        path = lab.directory / checkpoint
        begun = time.perf_counter()
        await engine.receive(transport, version, path if transport == "disk" else lab.trainer.buckets(path))
        figures[f"{transport}: seconds"] = round(time.perf_counter() - begun, 3)
        pairs = await many(engine, 16, 64, transport)
        figures[f"{transport}: against the new weights"] = distance(pairs, lab.reference(checkpoint).log_probs)
        other = {"moe-1": "moe-2", "moe-2": "moe-1"}[checkpoint]
        figures[f"{transport}: against the old weights"] = distance(pairs, lab.reference(other).log_probs)
        figures[f"{transport}: transformers bfloat16 against float32"] = rounding(lab, checkpoint, pairs)
        figures[f"{transport}: version stamped"] = pairs[0][1].weight_versions[-1]
    return figures


async def push_in_flight(lab: Lab, server: str, mode: str, version: int, checkpoints: list[str]) -> dict[str, Any]:
    """Eight long requests, a pause, a push from one checkpoint to another, and the rest of the requests."""
    engine, (before, after) = lab.engines[server], checkpoints
    running = asyncio.create_task(many(engine, 8, 1000, f"{mode}{version}"))
    await asyncio.sleep(0.5)
    begun = time.perf_counter()
    if mode == "server retract":
        await raw(lab, server, "/pause_generation", {"mode": "retract"})
        engine._flights.mode = "in_place"  # so that the engine leaves the server's requests and cache alone
    else:
        await engine.pause(mode)  # type: ignore[arg-type]
    figures: dict[str, Any] = {"seconds to pause": round(time.perf_counter() - begun, 3)}
    try:
        await engine.receive("cuda_ipc", version, lab.trainer.buckets(lab.directory / after))
    finally:
        await engine.resume()
    figures["seconds until resumed"] = round(time.perf_counter() - begun, 3)
    pairs = await running
    split = [r.weight_versions.index(version) if version in r.weight_versions else len(r.tokens) for _, r in pairs]
    figures["tokens of the old version, a request"] = split
    figures["lengths"] = [len(r.tokens) for _, r in pairs]
    figures["finish reasons"] = sorted({r.finish_reason for _, r in pairs})
    old, new = lab.reference(before).log_probs, lab.reference(after).log_probs
    figures["old part against the old weights"] = distance(pairs, old, version=pairs[0][1].weight_versions[0])
    figures["new part against the new weights"] = distance(pairs, new, version=version)
    firsts = []
    for (request, result), at in zip(pairs, split, strict=True):
        if at < len(result.tokens):
            whole, place = [*request.tokens, *result.tokens], len(request.tokens) + at
            firsts.append([abs(result.log_probs[at] - log_probs(whole)[place]) for log_probs in (old, new)])
    figures["first token of the new version, against old and new"] = np.round(firsts, 3).tolist()
    return figures


async def push_while_running(lab: Lab) -> dict[str, Any]:
    """Three ways of keeping requests alive through a push."""
    figures: dict[str, Any] = {}
    there, back = ["dense-1", "dense-2"], ["dense-2", "dense-1"]
    for server, mode, version, checkpoints in (
        ("dense", "retract", 5, back),
        ("seeded", "in_place", 2, there),
        ("seeded", "server retract", 3, back),
    ):
        for name, value in (await push_in_flight(lab, server, mode, version, checkpoints)).items():
            figures[f"{mode}: {name}"] = value
    await lab.engines["seeded"].receive("cuda_ipc", 4, lab.trainer.buckets(lab.directory / "dense-1"))
    return figures


async def one_stamp_a_reply(lab: Lab) -> dict[str, Any]:
    """A reply that is not streamed has the version at its end; a push to a server that is not paused waits."""
    task = asyncio.create_task(raw(lab, "seeded", "/generate", plain(prompt(2, 20), 800)))
    await asyncio.sleep(0.5)
    await raw(lab, "seeded", "/pause_generation", {"mode": "in_place"})
    async for bucket in lab.trainer.buckets(lab.directory / "dense-1", mib=1024):
        body = {"serialized_named_tensors": bucket, "flush_cache": False, "weight_version": "5"}
        lab.replies["update"] = (await raw(lab, "seeded", "/update_weights_from_tensor", body)).json()
    await raw(lab, "seeded", "/continue_generation", {})
    meta = (await task).json()["meta_info"]
    running = asyncio.create_task(raw(lab, "seeded", "/generate", plain(prompt(2, 20), 800)))
    await asyncio.sleep(0.3)
    disk = {"model_path": str(lab.directory / "dense-1"), "flush_cache": False}
    begun = time.perf_counter()
    await raw(lab, "seeded", "/update_weights_from_disk", disk)
    waited = time.perf_counter() - begun
    await running
    begun = time.perf_counter()
    await raw(lab, "seeded", "/update_weights_from_disk", disk)
    idle = time.perf_counter() - begun
    # The engine hears of that version, too: it takes answers of no other than it has sent.
    await lab.engines["seeded"].receive("disk", 5, lab.directory / "dense-1")
    return {
        "one stamp for 800 tokens of two versions": meta["weight_version"],
        "seconds of a push beside a running request": round(waited, 3),
        "seconds of the same push when idle": round(idle, 3),
    }


async def aborting(lab: Lab) -> dict[str, Any]:
    engine, figures = lab.engines["moe"], dict[str, Any]()
    long = GenerateRequest("long", prompt(1, 20), SamplingParams(max_new_tokens=4000), routed_experts=True)
    running = asyncio.create_task(engine.generate(long))
    await asyncio.sleep(0.5)
    begun = time.perf_counter()
    await engine.abort("long")
    result: GenerateResult = await running
    figures["seconds until it returned"] = round(time.perf_counter() - begun, 3)
    figures["tokens, log-probs, reason"] = [len(result.tokens), len(result.log_probs), result.finish_reason]
    figures["experts"] = None if result.routed_experts is None else list(result.routed_experts.shape)
    names = ("a1", "a10", "b")
    tasks = [asyncio.create_task(answer(lab, "moe", plain([5, 6], 1500) | {"rid": name})) for name in names]
    await asyncio.sleep(0.3)
    await raw(lab, "moe", "/abort_request", {"rid": "a1"})
    replies = await asyncio.gather(*tasks)
    lab.replies["abort"] = trimmed(replies[0])
    figures["abort of rid a1: reasons of a1, a10, b"] = [r["meta_info"]["finish_reason"]["type"] for r in replies]
    body = plain([5, 6], 4000) | {"return_routed_experts": True, "rid": "q"}
    task = asyncio.create_task(answer(lab, "moe", body))
    await asyncio.sleep(0.3)
    await raw(lab, "moe", "/pause_generation", {"mode": "retract"})
    await asyncio.sleep(0.3)
    health = await engine.health()
    figures["health while paused: running, waiting"] = [health.running, health.waiting]
    await raw(lab, "moe", "/abort_request", {"rid": "q"})
    queued = await task
    lab.replies["abort queued"] = trimmed(queued)
    figures["aborted while retracted: tokens, keys"] = [len(queued["output_ids"]), sorted(queued["meta_info"])]
    await raw(lab, "moe", "/continue_generation", {})
    begun = time.perf_counter()
    await raw(lab, "moe", "/health")
    figures["seconds of /health when idle"] = round(time.perf_counter() - begun, 3)
    flushing = asyncio.create_task(raw(lab, "moe", "/generate", plain([5, 6], 300)))
    await asyncio.sleep(0.2)
    figures["flush_cache beside a running request"] = (await raw(lab, "moe", "/flush_cache", {})).status_code
    await flushing
    return figures


def trimmed(reply: dict, keep: int = 3) -> dict:
    """A long reply cut to a few tokens, for a fixture."""
    meta = dict(reply["meta_info"])
    if "output_token_logprobs" in meta:
        meta["output_token_logprobs"] = meta["output_token_logprobs"][:keep]
    meta["completion_tokens"] = keep
    return reply | {"output_ids": reply["output_ids"][:keep], "meta_info": meta}


async def sleeping(lab: Lab) -> dict[str, Any]:
    """Memory of the whole card around sleep and wake, part by part, with a push between."""
    engine, figures = lab.engines["dense"], dict[str, Any]()

    def used() -> int:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])

    async def step(name: str, change: Any) -> None:
        before, begun = used(), time.perf_counter()
        await change
        figures[name] = f"{used() - before:+d} MiB, {time.perf_counter() - begun:.3f} s"

    figures["used before"] = f"{used()} MiB"
    for part in ("kv_cache", "weights", "graphs"):
        await step(f"sleep {part}", engine.sleep(frozenset({part})))
    try:
        await engine.generate(GenerateRequest("asleep", [5, 6], SamplingParams(max_new_tokens=2)))
    except EngineError as error:
        figures["generate while asleep"] = str(error)
    await step("wake weights", engine.wake(frozenset({"weights"})))
    await step("push", engine.receive("cuda_ipc", 6, lab.trainer.buckets(lab.directory / "dense-2")))
    for part in ("kv_cache", "graphs"):
        await step(f"wake {part}", engine.wake(frozenset({part})))  # type: ignore[arg-type]
    figures["used after"] = f"{used()} MiB"
    figures["afterwards, against the pushed weights"] = distance(
        await many(engine, 16, 64, "awake"), lab.reference("dense-2").log_probs
    )
    return figures


async def sudden_ends(lab: Lab) -> dict[str, Any]:
    """Calls that end the server process. Each has a server to itself."""

    async def outcome(server: str, path: str, body: dict) -> str:
        try:
            reply = await raw(lab, server, path, body, timeout=8)
            answer = f"{reply.status_code} {reply.text[:80]}"
        except httpx.HTTPError as error:
            answer = type(error).__name__
        await asyncio.sleep(4)
        try:
            alive = (await raw(lab, server, "/model_info", timeout=4)).status_code == 200
        except httpx.HTTPError:
            alive = False
        return f"{answer}; then {'alive' if alive else 'the server is gone'}"

    waiting = asyncio.create_task(raw(lab, "moe", "/generate", plain([5, 6], 4000)))
    await asyncio.sleep(0.3)
    await raw(lab, "moe", "/pause_generation", {"mode": "retract"})
    path = {"model_path": str(lab.directory / "moe-1"), "flush_cache": True}
    shape = {"model.norm.weight": [7]}
    buckets = lab.trainer.buckets(lab.directory / "dense-1", extra=shape, mib=1024)
    tensors = {"serialized_named_tensors": await anext(buckets), "flush_cache": False}
    ends = await asyncio.gather(
        outcome("moe", "/update_weights_from_disk", path),
        outcome("dense", "/update_weights_from_tensor", tensors),
        outcome("seeded", "/generate", plain([VOCABULARY + 7], 8)),
    )
    waiting.cancel()
    names = ("a push that flushes, with requests retracted", "a tensor of the wrong shape", "a token of no word")
    return dict(zip(names, ends, strict=True))
