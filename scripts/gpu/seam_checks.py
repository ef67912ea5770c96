"""The checks of `seam_sglang.py` that only ask: each takes the lab and returns figures.

Differences of log-probabilities are absolute, in nats. `dense` and `moe` serve their first checkpoint here.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from miles.types import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from seam_sglang import Attached, Lab

VOCABULARY = 1024
ANY_TOP_K = (1 << 30) - 1
TRAITS = (
    *("skip_tokenizer_init", "enable_memory_saver", "enable_weights_cpu_backup", "enable_return_routed_experts"),
    *("enable_priority_scheduling", "enable_deterministic_inference", "incremental_streaming_output", "version"),
)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCABULARY), k=length)


async def many(engine: Attached, count: int, length: int, name: str, **sampling: Any) -> list[tuple]:
    """`count` generations at once: pairs of request and result."""
    requests = [
        GenerateRequest(
            f"{name}-{i}", prompt(i, 16 + 5 * i), SamplingParams(max_new_tokens=length, **sampling), i, engine.routes
        )
        for i in range(count)
    ]
    return list(zip(requests, await asyncio.gather(*[engine.generate(r) for r in requests]), strict=True))


def distance(pairs: list[tuple], log_probs: Any, temperature: float = 1.0, version: int | None = None) -> dict:
    """Mean and largest |engine - reference| over generated tokens (of one weight version)."""
    gaps = []
    for request, result in pairs:
        theirs = log_probs([*request.tokens, *result.tokens], temperature)[len(request.tokens) :]
        chosen = [version in (None, v) for v in result.weight_versions]
        gaps.append(np.abs(np.array(result.log_probs) - theirs)[chosen])
    return spread(np.concatenate(gaps))


def spread(gaps: np.ndarray) -> dict:
    if not gaps.size:
        return {"tokens": 0}
    return {"mean": f"{gaps.mean():.5f}", "max": f"{gaps.max():.5f}", "tokens": int(gaps.size)}


async def raw(lab: Lab, server: str, path: str, body: dict | None = None, timeout: float = 60) -> httpx.Response:
    async with httpx.AsyncClient(base_url=lab.url(server), timeout=timeout) as client:
        return await (client.get(path) if body is None else client.post(path, json=body))


async def answer(lab: Lab, server: str, body: dict) -> dict[str, Any]:
    """A reply of `/generate`, as the server sent it."""
    return (await raw(lab, server, "/generate", body)).json()


def plain(tokens: list[int], length: int, **sampling: Any) -> dict[str, Any]:
    params = {"max_new_tokens": length, "temperature": 1.0} | sampling
    return {"input_ids": tokens, "sampling_params": params, "return_logprob": True}


async def log_probs(lab: Lab) -> dict[str, Any]:
    """Engine against transformers, dense and MoE, at two temperatures; the log-probabilities are those at it."""
    figures: dict[str, Any] = {}
    for kind in ("dense", "moe"):
        for temperature in (1.0, 0.7):
            pairs = await many(lab.engines[kind], 16, 128, f"lp{temperature}", temperature=temperature)
            for dtype in ("bfloat16", "float32"):
                reference = lab.reference(f"{kind}-1", dtype).log_probs
                figures[f"{kind} T={temperature} against {dtype}"] = distance(pairs, reference, temperature)
        for_one = lab.reference(f"{kind}-1").log_probs
        figures[f"{kind} T=0.7 read as T=1"] = distance(pairs, lambda t, _, f=for_one: f(t), 1.0)
        figures[f"{kind} transformers bfloat16 against float32"] = rounding(lab, f"{kind}-1", pairs)
    return figures


def rounding(lab: Lab, checkpoint: str, pairs: list[tuple]) -> dict:
    """The yardstick: how far transformers in bfloat16 is from itself in float32 on the same generated tokens."""
    rough, exact = (lab.reference(checkpoint, dtype).log_probs for dtype in ("bfloat16", "float32"))
    whole = [([*q.tokens, *r.tokens], len(q.tokens)) for q, r in pairs]
    return spread(np.concatenate([np.abs(rough(tokens) - exact(tokens))[start:] for tokens, start in whole]))


async def scoring(lab: Lab) -> dict[str, Any]:
    """Prefill of the same tokens against generation, before and after the cache was flushed."""
    figures: dict[str, Any] = {}
    for kind in ("dense", "moe"):
        engine = lab.engines[kind]
        pairs = await many(engine, 16, 128, "score")
        for when in ("cache warm", "cache flushed"):
            scores = await asyncio.gather(*[engine.score([*q.tokens, *r.tokens]) for q, r in pairs])
            gaps = [np.abs(s[len(q.tokens) :] - r.log_probs) for s, (q, r) in zip(scores, pairs, strict=True)]
            figures[f"{kind} prefill against generation, {when}"] = spread(np.concatenate(gaps))
            await engine.flush_cache()
    from_start = {"logprob_start_len": 0}
    replies = [await answer(lab, "dense", plain(prompt(1, 24), 0, temperature=t) | from_start) for t in (0.5, 1.0)]
    both = [[p or 0.0 for p, *_ in reply["meta_info"]["input_token_logprobs"]] for reply in replies]
    lab.replies["score"] = await answer(lab, "dense", plain(prompt(1, 6), 0) | from_start)
    figures["prompt log-probs at T=0.5 against T=1"] = spread(np.abs(np.subtract(both[0], both[1])))
    return figures


async def truncated_sampling(lab: Lab) -> dict[str, Any]:
    """Under top_p the ordinary log-probs are of the full distribution; the sampling log-probs of the cut one."""
    reference = lab.reference("dense-1", "float32")
    gaps: dict[str, list[float]] = {"plain": [], "sampling": []}
    masked = {"return_sampling_mask": True}
    body = plain(prompt(3, 20), 64, top_p=0.8, top_k=ANY_TOP_K) | masked
    reply = await answer(lab, "dense", body)
    lab.replies["top_p"] = await answer(lab, "dense", plain(prompt(3, 6), 2, top_p=0.2, top_k=8) | masked)
    rows = reference.distribution([*body["input_ids"], *reply["output_ids"]])[19:]
    for i, (row, token) in enumerate(zip(rows, reply["output_ids"], strict=True)):
        probabilities = np.sort(np.exp(row))[::-1]
        cut = int((probabilities.cumsum() - probabilities <= 0.8).sum())
        gaps["plain"].append(abs(reply["meta_info"]["output_token_logprobs"][i][0] - row[token]))
        renormalised = row[token] - np.log(probabilities[:cut].sum())
        gaps["sampling"].append(abs(reply["meta_info"]["output_token_sampling_logprobs"][i] - renormalised))
    support = [len(kept) for kept in reply["meta_info"]["output_token_sampling_mask"]]
    refused = await raw(lab, "dense", "/generate", plain([5, 6], 2, top_p=0.8) | masked)
    result = await lab.engines["dense"].generate(
        GenerateRequest("top-p", prompt(3, 20), SamplingParams(top_p=0.8, max_new_tokens=8))
    )
    return {
        "output_token_logprobs against the full distribution": spread(np.array(gaps["plain"])),
        "output_token_sampling_logprobs against the cut one": spread(np.array(gaps["sampling"])),
        "support returned, tokens a position": float(np.mean(support)),
        "mask without top_k": f"{refused.status_code} {refused.text[:120]}",
        "through the protocol": f"{len(result.tokens)} tokens, log-probs {np.round(result.log_probs[:3], 3)}",
    }


async def routed_experts(lab: Lab) -> dict[str, Any]:
    """Rows against transformers' router: identical sets of experts, and where they differ, how close the call was."""
    pairs = await many(lab.engines["moe"], 16, 128, "experts")
    figures: dict[str, Any] = {"shape of the first": list(pairs[0][1].routed_experts.shape)}
    figures["rows are tokens - 1"] = all(len(r.routed_experts) == len(q.tokens) + len(r.tokens) - 1 for q, r in pairs)
    for dtype in ("bfloat16", "float32"):
        same, slots, margins = [], [], []
        for request, result in pairs:
            theirs, margin = lab.reference("moe-1", dtype).experts([*request.tokens, *result.tokens])
            ours = np.sort(result.routed_experts, -1)
            same.append((ours == theirs).all(-1))
            rows = zip(ours.reshape(-1, 4), theirs.reshape(-1, 4), strict=True)
            slots.append([len(np.intersect1d(a, b)) / 4 for a, b in rows])
            margins.append(margin[~same[-1]])
        share = np.concatenate(same).mean(0)
        figures[f"{dtype}: same set, a token and layer"] = f"{share.mean():.4f}, by layer {share.round(4).tolist()}"
        figures[f"{dtype}: same expert, a slot"] = f"{np.concatenate(slots).mean():.4f}"
        figures[f"{dtype}: margin of the router logits where sets differ"] = spread(np.concatenate(margins))
    body = plain(prompt(5, 12), 4) | {"return_routed_experts": True}
    lab.replies["experts"] = await answer(lab, "moe", body)
    tail = await answer(lab, "moe", body | {"routed_experts_start_len": 10})
    figures["base64 characters, all rows and from row 10"] = [
        len(r["meta_info"]["routed_experts"]) for r in (lab.replies["experts"], tail)
    ]
    unasked = await raw(lab, "dense", "/generate", body)
    figures["asked of a server without the flag: status, sent"] = [unasked.status_code, "experts" in unasked.text]
    return figures


async def seeds(lab: Lab) -> dict[str, Any]:
    """The same request alone and in company, with and without deterministic inference."""
    figures: dict[str, Any] = {}
    for name, what in (("dense", "default"), ("seeded", "deterministic")):
        engine = lab.engines[name]
        request = GenerateRequest("seed", prompt(7, 30), SamplingParams(max_new_tokens=64), seed=11)
        alone = await engine.generate(request)
        await engine.flush_cache()
        crowd = asyncio.gather(many(engine, 16, 64, "crowd"), engine.generate(request))
        company = (await crowd)[1]
        other = await engine.generate(GenerateRequest("other", request.tokens, request.sampling, seed=12))
        same = min(len(alone.tokens), len(company.tokens))
        gap = np.abs(np.array(alone.log_probs[:same]) - company.log_probs[:same])
        figures[f"{what}: same tokens"] = alone.tokens == company.tokens
        figures[f"{what}: largest log-prob difference"] = float(gap.max()) if alone.tokens == company.tokens else "-"
        figures[f"{what}: another seed, same tokens"] = other.tokens == alone.tokens
        score = (await engine.score([*request.tokens, *alone.tokens]))[len(request.tokens) :]
        figures[f"{what}: prefill against generation"] = spread(np.abs(score - alone.log_probs))
    return figures


async def stopping(lab: Lab) -> dict[str, Any]:
    """What a stop looks like, and replies worth keeping."""
    greedy = plain(prompt(4, 10), 6, temperature=0)
    free = await answer(lab, "dense", greedy)
    token = free["output_ids"][3]
    greedy["sampling_params"]["stop_token_ids"] = [token]
    stopped = await answer(lab, "dense", greedy)
    lab.replies |= {"length": free, "stop": stopped}
    string = await raw(lab, "dense", "/generate", plain([5, 6], 8, stop=["x"]))
    minimum = await raw(lab, "dense", "/generate", plain([5, 6], 8, min_new_tokens=4))
    long = await raw(lab, "dense", "/generate", plain([7] * 9000, 2))
    lab.replies |= {"stop string": [string.status_code, string.text], "too long": [long.status_code, long.text]}
    server = (await raw(lab, "seeded", "/server_info")).json()
    lab.replies["server_info"] = {key: server.get(key) for key in TRAITS}
    lab.replies["model_info"] = (await raw(lab, "dense", "/model_info")).json()
    lab.replies["loads"] = (await raw(lab, "dense", "/v1/loads?include=core")).json()
    stream = await raw(lab, "seeded", "/generate", plain(prompt(4, 10), 3) | {"stream": True})
    lab.replies["stream"] = stream.text
    return {
        "stop token is kept": stopped["output_ids"][-1] == token,
        "finish reasons": [free["meta_info"]["finish_reason"], stopped["meta_info"]["finish_reason"]],
        "a stop string, no tokenizer": f"{string.status_code} {string.text[:90]}",
        "min_new_tokens, no tokenizer": f"{minimum.status_code} {minimum.text[:90]}",
        "prompt longer than the context": f"{long.status_code} {long.text[:90]}",
        "chunks of a stream of 3 tokens": stream.text.count("data: {"),
    }


async def throughput(lab: Lab) -> dict[str, Any]:
    """256 requests of 256 tokens over HTTP on the tiny dense model, each way twice; the client is one Python process,
    and with streams it is what limits the speed."""
    figures: dict[str, Any] = {}
    for name, what, streams in (
        ("dense", "default, whole replies", False),
        ("seeded", "deterministic, whole replies", False),
        ("dense", "default, streams", True),
    ):
        engine, speeds = lab.engines[name], []
        usual = engine.options.stream
        engine.streaming(streams)
        for round_ in range(2):
            sampling = SamplingParams(max_new_tokens=256)
            requests = [GenerateRequest(f"t{round_}-{i}", prompt(i, 64), sampling, i) for i in range(256)]
            begun = time.perf_counter()
            results = await asyncio.gather(*[engine.generate(r) for r in requests])
            speeds.append(round(sum(len(r.tokens) for r in results) / (time.perf_counter() - begun)))
        engine.streaming(usual)
        figures[f"{what}: tokens/s, cold and warm"] = speeds
    return figures
