"""`miles serve CHECKPOINT`."""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.cli import Call

if TYPE_CHECKING:
    from miles.config.load import Resolved
    from miles_serve.service import Service

HELP = """usage: miles serve CHECKPOINT [--port 30000] [--engine NAME] [--flag value] [--section.key=value]

Answers over HTTP with a model: SGLang's API (/generate, control) and OpenAI's (/v1/chat/completions, /v1/completions).
CHECKPOINT is a Hugging Face folder, or a name on the hub.
  --host HOST                     where to listen [127.0.0.1: this machine only]
  --port PORT                     0 takes one that is free [30000]
  --api-key-variable NAME         environment variable with the key that clients have to send [none: no key]
  --served-model-name NAME        what clients call the model [CHECKPOINT]
  --device DEVICE                 auto, cpu, cuda or cuda:N [auto]
  --dtype TYPE                    auto, fp32, bf16 or fp64; auto is bf16 on a GPU and fp32 elsewhere [auto]
  --engine NAME                   the rollout engine [torch]
  --engine.OPTION=VALUE           an option of it, such as --engine.max_len=8192
  --incremental-streaming-output  pieces of /generate streams hold what is new, and not everything so far
SIGINT and SIGTERM stop it: requests have 5 seconds to end, and are then answered with what they have.
`miles train --help` lists the other flags; of them those of model, chat format, resources and engine matter here."""

OWN = ("--host", "--port", "--api-key-variable", "--served-model-name", "--dtype", "--engine",
       "--incremental-streaming-output")  # fmt: skip
LARGEST_PORT = 65535


@dataclass(frozen=True)
class Wishes:
    """What the command line says of the server itself."""

    host: str
    port: int
    api_key: str | None
    name: str | None
    dtype: str
    incremental: bool


def run(call: Call) -> int:
    """Serve until a signal asks to stop."""
    if call.help:
        print(HELP)
        return 0
    import asyncio

    from miles.cli.resolving import resolve_call
    from miles.log import speak

    wishes = _wishes(call)
    extra = _for_the_engine(call) + _model(call, wishes.dtype)
    resolved, _ = resolve_call(call, "show", extra, own=OWN)
    speak()
    asyncio.run(_serve(resolved, wishes))
    return 0


def _wishes(call: Call) -> Wishes:
    from miles.api import ConfigError

    host, port = call.take_value("--host") or "127.0.0.1", call.take_value("--port") or "30000"
    if not port.isdecimal() or int(port) > LARGEST_PORT:
        raise ConfigError(f"--port {port}: must be a number from 0 (one that is free) to {LARGEST_PORT}")
    variable = call.take_value("--api-key-variable")
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        raise ConfigError(f"--api-key-variable {variable}: the environment variable {variable} is not set")
    name, dtype = call.take_value("--served-model-name"), call.take_value("--dtype") or "auto"
    return Wishes(host, int(port), key, name, dtype, call.take("--incremental-streaming-output"))


def _for_the_engine(call: Call) -> list[str]:
    """`--engine` as the configuration spells it."""
    found = []
    if name := call.take_value("--engine"):
        found = ["--rollout-engine", name]
    for word in [word for word in call.words if word.startswith("--engine.")]:
        call.words.remove(word)
        found.append(word.replace("--engine.", "--rollout.engine.", 1))
    return found


def _model(call: Call, dtype: str) -> list[str]:
    """The checkpoint and what it is computed in, as the configuration spells them."""
    from miles.api import ConfigError

    if call.words and not call.words[0].startswith("-"):
        checkpoint = ["--hf-checkpoint", call.words.pop(0)]
    elif any(word.partition("=")[0] in ("--hf-checkpoint", "--model.hf_checkpoint") for word in call.words):
        checkpoint = []
    else:
        raise ConfigError("miles serve needs a checkpoint: `miles serve CHECKPOINT`, a Hugging Face folder or hub name")
    if dtype == "auto":
        from miles.modeling import resolve_device

        on_gpu = resolve_device(_value(call, "--device") or "auto").startswith("cuda")
        dtype = "bf16" if on_gpu else "fp32"
    return [*checkpoint, "--train-dtype", dtype]


def _value(call: Call, flag: str) -> str | None:
    """The value of a flag, which stays where it is."""
    return Call(words=list(call.words)).take_value(flag)


async def _serve(resolved: Resolved, wishes: Wishes) -> None:
    from miles_serve.server import listening, until_stopped

    async with AsyncExitStack() as stack:
        service = await _service(resolved, wishes, stack)
        async with listening(service, wishes.host, wishes.port) as url:
            print(f"miles: serving {service.model} at {url} (SGLang's API, and OpenAI's under /v1)", flush=True)
            number = await until_stopped()
            print(f"miles: {number.name}: stopping", file=sys.stderr, flush=True)


async def _service(resolved: Resolved, wishes: Wishes, stack: AsyncExitStack) -> Service:
    """The model and its engine, which is started. Closing it is left to the stack."""
    from miles.api import ConfigError
    from miles.build import context_limit, load_model
    from miles.crew import engine_setup, make_crew, make_engine
    from miles.modeling import chat_format_for, end_token_ids
    from miles_serve.service import Service

    config, registry = resolved.config, resolved.registry
    registry.plugins.hook.miles_configure(config=config)
    model = load_model(config, registry)
    crew = make_crew(config, registry, stack, trains=False)
    setup = engine_setup(crew, config.rollout.engine, model.checkpoint, load_weights=True)
    engine = await make_engine(crew, setup, stack)
    if not engine.generates:
        raise ConfigError(f"--engine {config.rollout.engine.name}: it generates nothing that could be served")
    ends = end_token_ids(model.checkpoint)
    own = (model.tokenizer.eos_token_id, *ends)
    limits = [limit for limit in (context_limit(config, model), getattr(engine, "max_len", None)) if limit]

    def chat_with(options):
        told = config.data.model_copy(update={"chat_template_kwargs": {**config.data.chat_template_kwargs, **options}})
        return chat_format_for(
            registry, config.model_copy(update={"data": told}), model.hf_config, model.tokenizer, ends
        )

    return Service(
        engine=engine,
        chat=model.chat,
        tokenizer=model.tokenizer,
        hf_config=model.hf_config,
        model=wishes.name or str(config.model.hf_checkpoint),
        model_path=str(model.checkpoint),
        context_length=min(limits),
        end_token_ids=tuple(dict.fromkeys(token for token in own if token is not None)),
        chat_with=chat_with,
        api_key=wishes.api_key,
        incremental=wishes.incremental,
        version=(await engine.health()).weight_version,
    )
