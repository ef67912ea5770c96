"""What SGLang's HTTP API says of the server and its model."""

from __future__ import annotations

import asyncio
import time
import uuid
from importlib.metadata import version

from aiohttp import web

from miles.api import EngineError, SamplingParams
from miles_serve.bodies import TokenizeBody, read
from miles_serve.service import Service

HEALTH_SECONDS = 20.0
"""How long a token may take when `/health_generate` asks for one."""


async def health(service: Service, request: web.Request) -> web.Response:
    """Whether the engine answers at all."""
    if service.stopping:
        return web.Response(status=503)
    try:
        await service.engine.health()
    except EngineError as error:
        return web.Response(text=str(error), status=503)
    return web.Response()


async def health_generate(service: Service, request: web.Request) -> web.Response:
    """Whether a token comes out. While requests are under way, or it is paused, this is `/health`."""
    alive = await health(service, request)
    if alive.status != 200 or service.traffic.paused or service.traffic.underway:
        return alive
    sampling = SamplingParams(temperature=0.0, max_new_tokens=1)
    probe = service.request([0], sampling, id=f"HEALTH_CHECK_{uuid.uuid4().hex}")
    try:
        await asyncio.wait_for(service.generate(probe), HEALTH_SECONDS)
    except (EngineError, TimeoutError) as error:
        return web.Response(text=str(error) or f"no token in {HEALTH_SECONDS} s", status=503)
    return web.Response()


async def model_info(service: Service, request: web.Request) -> web.Response:
    return web.json_response(
        {
            "model_path": service.model_path,
            "tokenizer_path": service.tokenizer.name_or_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": service.label(),
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": service.hf_config.model_type,
            "architectures": service.hf_config.architectures,
        }
    )


async def server_info(service: Service, request: web.Request) -> web.Response:
    """Those of SGLang's server arguments that say what can be asked for."""
    return web.json_response(
        {
            "server": "miles serve",
            "version": version("miles-serve"),
            "api": "sglang 0.5.17",
            "model_path": service.model_path,
            "served_model_name": service.model,
            "tokenizer_path": service.tokenizer.name_or_path,
            "weight_version": service.label(),
            "context_length": service.context_length,
            "vocab_size": service.vocabulary,
            "tp_size": 1,
            "dp_size": 1,
            "skip_tokenizer_init": False,
            "incremental_streaming_output": service.incremental,
            "enable_deterministic_inference": True,  # what it means to clients: seeds count
            "enable_priority_scheduling": True,
            "enable_return_routed_experts": service.routes,
            "enable_memory_saver": True,
            "enable_weights_cpu_backup": False,
            "startup_time": service.started,
            "internal_states": [],
        }
    )


async def tokenize(service: Service, request: web.Request) -> web.Response:
    """A text as the model's tokens, or several: with it clients compare their tokenizer."""
    body = await read(request, TokenizeBody)
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    tokens = [service.tokenizer.encode(text, add_special_tokens=body.add_special_tokens) for text in texts]
    counts = [len(one) for one in tokens]
    alone = isinstance(body.prompt, str)
    told = {"tokens": tokens[0], "count": counts[0]} if alone else {"tokens": tokens, "count": counts}
    return web.json_response(told | {"max_model_len": service.context_length})


async def loads(service: Service, request: web.Request) -> web.Response:
    """`/v1/loads`."""
    told = await service.engine.health()
    load = {"dp_rank": 0, "num_running_reqs": told.running, "num_waiting_reqs": told.waiting}
    return web.json_response({"version": version("miles-serve"), "timestamp": time.time(), "loads": [load]})
