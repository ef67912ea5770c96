"""Control of the engine over SGLang's HTTP API: pauses, aborts, memory, weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from miles.api import EnginePart, MilesError
from miles.toolkit import Shipment
from miles_serve.bodies import AbortBody, DiskBody, MemoryBody, PauseBody, VersionBody, read
from miles_serve.errors import RequestError
from miles_serve.service import Service

PARTS: dict[str, EnginePart] = {"weights": "weights", "kv_cache": "kv_cache", "cuda_graph": "graphs"}
"""SGLang's tags of memory, and what they are called here."""
LOAD_FORMATS = (None, "auto", "safetensors")
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


async def pause(service: Service, request: web.Request) -> web.Response:
    """Requests that come while it lasts wait, whatever the mode."""
    mode = (await read(request, PauseBody)).mode
    before, service.traffic.paused = service.traffic.paused, True
    try:
        await service.engine.pause(mode)
    except BaseException:
        service.traffic.paused = before
        raise
    if mode == "abort":
        await service.abort()  # those that had no turn yet
    return web.json_response({"message": "Generation paused successfully.", "status": "ok"})


async def resume(service: Service, request: web.Request) -> web.Response:
    await service.engine.resume()
    service.traffic.paused = False
    return web.json_response({"message": "Generation continued successfully.", "status": "ok"})


async def abort(service: Service, request: web.Request) -> web.Response:
    """An id stands for all that begin with it. As in SGLang nothing is said of whether there was one, and a request
    that has not arrived is not remembered."""
    body = await read(request, AbortBody)
    if body.abort_all or body.rid:
        await service.abort("" if body.abort_all else body.rid or "")
    return web.Response()


async def flush_cache(service: Service, request: web.Request) -> web.Response:
    """`?timeout=SECONDS` waits so long for requests to end."""
    try:
        seconds = float(request.query.get("timeout", "0"))
    except ValueError as error:
        raise RequestError(f"timeout must be a number of seconds, got {request.query['timeout']!r}.") from error
    if not seconds >= 0:
        raise RequestError(f"timeout must be at least 0, got {seconds}.")
    if not await service.traffic.idle(seconds):
        count = len(service.traffic.underway)
        return web.Response(text=f"Flush cache failed: {count} requests are running or waiting.\n", status=400)
    await service.engine.flush_cache()
    return web.Response(text=FLUSHED)


async def release_memory(service: Service, request: web.Request) -> web.Response:
    """Nothing may be under way: it could not go on."""
    parts = _parts(await read(request, MemoryBody))
    if service.traffic.underway:
        raise RequestError(
            f"{len(service.traffic.underway)} requests are under way: abort them, or wait for them, before memory is "
            "released."
        )
    await service.engine.sleep(parts)
    return web.json_response(None)


async def resume_memory(service: Service, request: web.Request) -> web.Response:
    await service.engine.wake(_parts(await read(request, MemoryBody)))
    return web.json_response(None)


def _parts(body: MemoryBody) -> frozenset[EnginePart]:
    tags = list(PARTS) if body.tags is None else body.tags
    if unknown := sorted(set(tags) - set(PARTS)):
        raise RequestError(f"tags must be among {', '.join(PARTS)}; got {', '.join(unknown)}.")
    return frozenset(PARTS[tag] for tag in tags)


async def update_from_disk(service: Service, request: web.Request) -> web.Response:
    """Weights of a Hugging Face folder. Unless the engine is paused, it waits for the requests that are under way, and
    those that come wait for it."""
    body = await read(request, DiskBody)
    try:
        folder = _folder(service, body)
        if body.abort_all_requests:
            await service.abort()
        await asyncio.shield(_receive(service, body, folder))  # a client that leaves does not stop it half-way
    except (MilesError, OSError, RequestError) as error:
        return web.json_response({"success": False, "message": str(error), "num_paused_requests": 0}, status=400)
    named = "" if body.weight_version is None else f" Weight version updated to {body.weight_version}."
    return web.json_response({"success": True, "message": f"Success{named}", "num_paused_requests": 0})


async def _receive(service: Service, body: DiskBody, folder: Path) -> None:
    async with service.traffic.alone():
        version = service.version + 1
        await service.engine.receive("disk", version, Shipment("miles.toolkit:read_weights", {"folder": folder}))
        service.labels[version] = service.label() if body.weight_version is None else body.weight_version
        service.version, service.model_path = version, body.model_path


def _folder(service: Service, body: DiskBody) -> Path:
    """The folder, if it can be received at all: what is refused here leaves the engine as it is."""
    folder = Path(body.model_path)
    if "disk" not in service.engine.accepts:
        raise RequestError(f"This engine takes no weights from disk; it takes: {', '.join(service.engine.accepts)}.")
    if body.load_format not in LOAD_FORMATS:
        raise RequestError(f"load_format {body.load_format!r} is not supported: only safetensors are read.")
    if not folder.is_dir():
        raise RequestError(f"model_path {body.model_path!r} is no folder on this machine.")
    if not any(folder.glob("*.safetensors")):
        raise RequestError(f"model_path {body.model_path!r} holds no *.safetensors.")
    return folder


async def update_version(service: Service, request: web.Request) -> web.Response:
    """Give the weights of now another name."""
    body = await read(request, VersionBody)
    if body.abort_all_requests:
        await service.abort()
    service.labels[service.version] = body.new_version
    said = {"success": True, "message": f"Weight version updated to {body.new_version}"}
    return web.json_response(said | {"new_version": body.new_version})


async def no_pickles(service: Service, request: web.Request) -> web.Response:
    """Calls of SGLang that carry pickled tensors, or want a process group with the trainer."""
    said = f"{request.path} is not offered: this server opens no pickles. Use /update_weights_from_disk."
    return web.json_response({"success": False, "message": said, "error": {"message": said}}, status=400)
