"""`python -m sglang.launch_server`, without SGLang: `miles serve`, which also takes weights as SGLang does.

    PYTHONPATH=$PWD/scripts/gpu/stand_in python scripts/gpu/sglang_job.py dense --small --device cpu

Of SGLang's arguments it heeds `--model-path`, `--host`, `--port`, `--dtype` and `--incremental-streaming-output`.
Buckets of `/update_weights_from_tensor` are kept until the version is updated, and then given to the torch engine at
once. They are pickles, which are trusted here, as SGLang trusts them: both sides are one user's on one machine.
"""

from __future__ import annotations

import base64
import pickle
import sys
from typing import Any

from aiohttp import web
from miles_serve import control, native

from miles.cli import main

DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
arrived: list[dict[str, Any]] = []


async def take_bucket(service: Any, request: web.Request) -> web.Response:
    handle, *_ = (await request.json())["serialized_named_tensors"]
    bucket = pickle.loads(base64.b64decode(handle))
    for place in bucket["metadata"]:
        part = bucket["flattened_tensor"][place.start_idx : place.end_idx]
        arrived.append({place.name: part.view(place.dtype).view(place.shape).clone()})
    return web.json_response({"success": True, "message": "Success"})


async def take_version(service: Any, request: web.Request) -> web.Response:
    if arrived:
        await service.engine.receive("inprocess", service.version + 1, list(arrived))
        arrived.clear()
        service.version += 1
    return await control.update_version(service, request)


def words() -> list[str]:
    """The command line of `miles serve` for that of SGLang."""
    given = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
    said = ["serve", given["--model-path"], "--device", "cpu", "--dtype", DTYPES[given.get("--dtype", "float32")]]
    said += ["--host", given["--host"], "--port", given["--port"]]
    return said + [flag for flag in sys.argv if flag == "--incremental-streaming-output"]


if __name__ == "__main__":
    native.POST["/update_weights_from_tensor"] = take_bucket
    native.POST["/update_weight_version"] = take_version
    sys.exit(main(words()))
