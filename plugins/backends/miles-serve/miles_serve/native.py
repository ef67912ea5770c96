"""SGLang's own HTTP API: which path is answered by whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web

from miles_serve import control, information
from miles_serve.generation import generate
from miles_serve.service import Service

Handler = Callable[[Service, web.Request], Awaitable[web.StreamResponse]]
GET: dict[str, Handler] = {
    "/health": information.health,
    "/health_generate": information.health_generate,
    "/ping": information.health,
    "/model_info": information.model_info,
    "/get_model_info": information.model_info,
    "/server_info": information.server_info,
    "/get_server_info": information.server_info,
    "/v1/loads": information.loads,
    "/flush_cache": control.flush_cache,
    "/release_memory_occupation": control.release_memory,
    "/resume_memory_occupation": control.resume_memory,
}
POST: dict[str, Handler] = {
    "/generate": generate,
    "/tokenize": information.tokenize,
    "/v1/tokenize": information.tokenize,
    "/abort_request": control.abort,
    "/pause_generation": control.pause,
    "/continue_generation": control.resume,
    "/flush_cache": control.flush_cache,
    "/release_memory_occupation": control.release_memory,
    "/resume_memory_occupation": control.resume_memory,
    "/update_weights_from_disk": control.update_from_disk,
    "/update_weight_version": control.update_version,
    "/update_weights_from_tensor": control.no_pickles,
    "/update_weights_from_distributed": control.no_pickles,
    "/update_weights_from_ipc": control.no_pickles,
    "/init_weights_update_group": control.no_pickles,
}


def routes(service: Service) -> list[web.RouteDef]:
    return [
        *(web.get(path, partial(handler, service)) for path, handler in GET.items()),
        *(web.post(path, partial(handler, service)) for path, handler in POST.items()),
        web.put("/generate", partial(generate, service)),
    ]
