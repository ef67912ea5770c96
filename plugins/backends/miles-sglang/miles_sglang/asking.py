"""What SGLang is asked: bodies of `/generate`, and the requests that it would answer wrongly or die of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from miles.api import EngineError, GenerateRequest, Routing
from miles_sglang.replies import Answer

ANY_TOP_K = (1 << 30) - 1
"""Larger than any vocabulary, yet not the value that SGLang reads as "no top_k"."""


@dataclass(frozen=True)
class Abilities:
    """What a server can do, from what it was started with (`/server_info`)."""

    max_len: int
    """Tokens of the longest sequence."""
    has_tokenizer: bool = True
    deterministic: bool = False
    """Seeds decide what is drawn."""
    priorities: int = 0
    """1: higher goes first; -1: lower goes first; 0: it knows none."""
    returns_experts: bool = False
    sleeps: bool = False
    keeps_weights: bool = False
    """While it sleeps."""
    streams: bool = False
    """In chunks that do not repeat what came before."""
    graphs: int | None = None
    """Sequences that its largest CUDA graph decodes at once; None where it has no graphs, or does not say."""

    @classmethod
    def of(cls, info: Mapping[str, Any], hf_config: Any) -> Abilities:
        model = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
        limits = (info.get("context_length") or model, info.get("max_total_num_tokens"))
        lower_first = bool(info.get("schedule_low_priority_values_first"))
        return cls(
            max_len=min((limit for limit in limits if limit), default=1 << 30),
            has_tokenizer=not info.get("skip_tokenizer_init"),
            deterministic=bool(info.get("enable_deterministic_inference")),
            priorities=(-1 if lower_first else 1) if info.get("enable_priority_scheduling") else 0,
            returns_experts=bool(info.get("enable_return_routed_experts")),
            sleeps=bool(info.get("enable_memory_saver")),
            keeps_weights=bool(info.get("enable_weights_cpu_backup")),
            streams=bool(info.get("incremental_streaming_output")),
            graphs=_graphs(info),
        )

    @classmethod
    def common(cls, each: Sequence[Abilities]) -> Abilities:
        """Of several servers. Raises EngineError when they differ in more than the room that they have, and graphs."""
        graphs = min((can.graphs for can in each if can.graphs), default=None)
        shared = replace(each[0], max_len=min(can.max_len for can in each), graphs=graphs)
        if any(replace(can, max_len=shared.max_len, graphs=graphs) != shared for can in each):
            raise EngineError(f"the servers of one engine were started differently: {each}")
        return shared


def _graphs(info: Mapping[str, Any]) -> int | None:
    decoding = (info.get("cuda_graph_config") or {}).get("decode") or {}
    return None if decoding.get("backend") == "disabled" else decoding.get("max_bs")


def refuse(request: GenerateRequest, can: Abilities, vocabulary: int, routing: Routing | None) -> None:
    """Raises EngineError for a request that cannot be served."""
    sampling = request.sampling
    refuse_tokens(request.tokens, vocabulary, can.max_len - 1)
    faults = {
        "carries images, and this engine sends text only": bool(request.multimodal),
        "asks for routed experts, and the model has none": request.routed_experts and routing is None,
        "asks for routed experts: start the server with --enable-return-routed-experts": request.routed_experts
        and not can.returns_experts,
        "has stop strings, which need a server with a tokenizer: start it without --skip-tokenizer-init": sampling.stop
        and not can.has_tokenizer,
        "has min_new_tokens, which need a server with a tokenizer: start it without --skip-tokenizer-init": (
            sampling.min_new_tokens and not can.has_tokenizer
        ),
        f"has min_p {sampling.min_p}, which ends a server that runs with --enable-deterministic-inference": (
            sampling.min_p and can.deterministic
        ),
        f"has max_new_tokens {sampling.max_new_tokens}, which must be at least 1": sampling.max_new_tokens < 1,
        f"has temperature {sampling.temperature}, which must not be negative": sampling.temperature < 0,
        "has sampling parameters that are not finite": not all(
            map(math.isfinite, (sampling.temperature, sampling.top_p, sampling.min_p))
        ),
    }
    for fault, present in faults.items():
        if present:
            raise EngineError(f"SGLang engine: request {request.id!r} {fault}")


def refuse_tokens(tokens: Sequence[int], vocabulary: int, most: int) -> None:
    """A token of no word ends the server."""
    if not 0 < len(tokens) <= most:
        raise EngineError(
            f"SGLang engine: a request of {len(tokens)} tokens, and it takes 1 to {most}: the limit is the server's "
            "--context-length, or the size of its cache"
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise EngineError(f"SGLang engine: a request has tokens outside the vocabulary [0, {vocabulary})")


def generation(answer: Answer, can: Abilities, stream: bool = False) -> dict[str, Any]:
    """The body that asks for the rest of an answer."""
    request, sampling, done = answer.request, answer.request.sampling, len(answer.tokens)
    room = min(sampling.max_new_tokens, can.max_len - len(request.tokens)) - done
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        "min_p": sampling.min_p,
        "max_new_tokens": room,
        # SGLang always adds the checkpoint's own end tokens to those given; with none given it must look at none.
        "ignore_eos": not sampling.stop_token_ids,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    if sampling.min_new_tokens > done:
        params["min_new_tokens"] = min(sampling.min_new_tokens - done, room)
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    if can.deterministic:
        params["sampling_seed"] = request.seed
    body: dict[str, Any] = {
        "input_ids": [*request.tokens, *answer.tokens],
        "sampling_params": params,
        "return_logprob": True,
        "stream": stream,
    }
    if sampling.truncates and sampling.temperature > 0:
        body["return_sampling_mask"] = True
        params["top_k"] = sampling.top_k if sampling.top_k > 0 else ANY_TOP_K
    if request.routed_experts:
        body |= {"return_routed_experts": True, "routed_experts_start_len": answer.experts_from}
    if can.priorities:
        body["priority"] = request.priority * can.priorities
    return body


def scoring(tokens: Sequence[int]) -> dict[str, Any]:
    """The body that asks for log-probabilities of given tokens."""
    return {
        "input_ids": list(tokens),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def scoring_next(tokens: Sequence[int], temperature: float) -> dict[str, Any]:
    """The body that asks for the log-probability of the last of these tokens, given the others, at a temperature."""
    return {
        "input_ids": list(tokens[:-1]),
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True},
        "return_logprob": True,
        "token_ids_logprob": [tokens[-1]],
    }
