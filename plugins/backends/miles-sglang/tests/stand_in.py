"""Stands for `python -m sglang.launch_server --model-path FOLDER --host HOST --port PORT [--load-format dummy] ...`

`miles serve` in SGLang's clothes: it also takes weights as flat buckets, in memory that processes share, which `miles
serve` does not. Appends its process id to the file that STAND_IN_PIDS names.
"""

import argparse
import asyncio
import base64
import os
import pickle
import sys
from pathlib import Path

import torch
from aiohttp import web
from miles_serve import native
from miles_serve.bodies import read
from miles_serve.server import listening, until_stopped
from miles_serve.service import Service
from pydantic import BaseModel

from miles.config import Config, Spec
from miles.modeling import bridge_for, load_hf_config, load_tokenizer
from miles.plugins import load_plugins
from miles.protocols import ChatContext, EngineContext
from miles.registry import Registry


class Buckets(BaseModel):
    serialized_named_tensors: list[str]
    load_format: str
    flush_cache: bool


async def from_tensor(service, request):
    """The weights of a small model fit into one bucket, so each is a whole push."""
    (handle,) = (await read(request, Buckets)).serialized_named_tensors
    said = pickle.loads(base64.b64decode(handle))
    group = {
        about.name: said["flattened_tensor"][about.start_idx : about.end_idx].view(about.dtype).reshape(about.shape)
        for about in said["metadata"]
    }
    async with service.traffic.alone():
        await service.engine.receive("inprocess", service.version + 1, iter([group]))
        service.version += 1
    return web.json_response({"success": True, "message": "Success"})


async def main(words):
    parser = argparse.ArgumentParser()
    for flag in ("--model-path", "--host", "--load-format"):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int)
    given, _ = parser.parse_known_args(words)
    torch.set_num_threads(1)
    registry, hf_config = Registry(load_plugins()), load_hf_config(given.model_path)
    tokenizer = load_tokenizer(given.model_path)
    context = EngineContext(
        checkpoint=Path(given.model_path),
        hf_config=hf_config,
        tokenizer=tokenizer,
        bridge=bridge_for(registry, Config(), hf_config),
        device="cpu",
        dtype="fp32",
        load_weights=given.load_format != "dummy",
        run_dir=Path(given.model_path),
    )
    engine = registry.build("rollout_engines", Spec(name="torch"), context=context)
    await engine.start()
    chat = registry.build("chat_formats", Spec(name="template"), context=ChatContext(tokenizer))
    limit = hf_config.max_position_embeddings
    native.POST["/update_weights_from_tensor"] = from_tensor
    service = Service(engine, chat, tokenizer, hf_config, "tiny", given.model_path, limit)
    async with listening(service, given.host, given.port):
        with open(os.environ["STAND_IN_PIDS"], "a") as file:
            file.write(f"{os.getpid()}\n")
        await until_stopped()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
