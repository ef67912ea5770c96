"""`miles serve CHECKPOINT`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.cli import Call

if TYPE_CHECKING:
    from miles.api import ChatFormat
    from miles.build import Model
    from miles.config.load import Resolved
    from miles_serve.service import Service

HELP = """usage: miles serve CHECKPOINT [--port 30000] [--engine NAME] [--flag value] [--section.key=value]

Answers over HTTP with a model: SGLang's API (/generate, control) and OpenAI's (/v1/chat/completions, /v1/completions).
CHECKPOINT is a Hugging Face folder, a name on the hub, or a run directory of miles, of which the newest checkpoint is
taken (or one of its checkpoints/step_NNNNNN).
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
HERE = ("127.0.0.1", "localhost", "::1")
OPEN_TO_ALL = (
    "miles: without a key, whoever reaches this host may use the server and change its weights: --api-key-variable NAME"
)


@dataclass(frozen=True)
class Wishes:
    """What the command line says of the server itself."""

    checkpoint: str
    run: Path | None
    """The run directory whose checkpoint it is, if it is one of miles."""
    host: str
    port: int
    api_key: str | None
    name: str
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
    extra = _for_the_engine(call)
    extra += ["--hf-checkpoint", wishes.checkpoint] if wishes.run is None else []
    resolved, _ = resolve_call(call, "show", [*extra, *_dtype(call, wishes)], own=OWN)
    speak()
    asyncio.run(_serve(resolved, wishes))
    return 0


def _wishes(call: Call) -> Wishes:
    """Taken out of the command line. What is left is for the configuration, that of a run of miles included."""
    from miles.api import ConfigError

    if not call.words or call.words[0].startswith("-"):
        raise ConfigError("miles serve needs a checkpoint: `miles serve CHECKPOINT`, a Hugging Face folder or hub name")
    checkpoint = call.words.pop(0)
    run = _run_of(Path(checkpoint))
    if run is not None:
        call.words.insert(0, str(run / "config.yaml"))
    host, port = call.take_value("--host") or "127.0.0.1", call.take_value("--port") or "30000"
    if not port.isdecimal() or int(port) > LARGEST_PORT:
        raise ConfigError(f"--port {port}: must be a number from 0 (one that is free) to {LARGEST_PORT}")
    variable = call.take_value("--api-key-variable")
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        raise ConfigError(f"--api-key-variable {variable}: the environment variable {variable} is not set")
    return Wishes(
        checkpoint,
        run,
        host,
        int(port),
        api_key=key,
        name=call.take_value("--served-model-name") or checkpoint,
        dtype=call.take_value("--dtype") or "auto",
        incremental=call.take("--incremental-streaming-output"),
    )


def _run_of(path: Path) -> Path | None:
    """The run directory that a path is, or that it is a checkpoint in. An export for Hugging Face is no such one."""
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    candidates = (path, *path.absolute().parents[:2])
    return next((p for p in candidates if (p / "config.yaml").is_file() and (p / "checkpoints").is_dir()), None)


def _for_the_engine(call: Call) -> list[str]:
    """`--engine` as the configuration spells it."""
    found = []
    if name := call.take_value("--engine"):
        found = ["--rollout-engine", name]
    for word in [word for word in call.words if word.startswith("--engine.")]:
        call.words.remove(word)
        found.append(word.replace("--engine.", "--rollout.engine.", 1))
    return found


def _dtype(call: Call, wishes: Wishes) -> list[str]:
    """What is computed in, as the configuration spells it; a run's own type stays unless another is asked for."""
    if wishes.dtype != "auto":
        return ["--train-dtype", wishes.dtype]
    if wishes.run is not None:
        return []
    from miles.modeling import resolve_device

    on_gpu = resolve_device(_value(call, "--device") or "auto").startswith("cuda")
    return ["--train-dtype", "bf16" if on_gpu else "fp32"]


def _value(call: Call, flag: str) -> str | None:
    """The value of a flag, which stays where it is."""
    return Call(words=list(call.words)).take_value(flag)


async def _serve(resolved: Resolved, wishes: Wishes) -> None:
    from miles_serve.server import listening, until_stopped

    async with AsyncExitStack() as stack:
        service = await _service(resolved, wishes, stack)
        gc.collect()
        gc.freeze()  # what was built lives as long as the process; to look through it again costs half a second
        async with listening(service, wishes.host, wishes.port) as url:
            print(f"miles: serving {service.model} at {url} (SGLang's API, and OpenAI's under /v1)", flush=True)
            if wishes.api_key is None and wishes.host not in HERE:
                print(OPEN_TO_ALL, file=sys.stderr, flush=True)
            number = await until_stopped()
            print(f"miles: {number.name}: stopping", file=sys.stderr, flush=True)


async def _service(resolved: Resolved, wishes: Wishes, stack: AsyncExitStack) -> Service:
    """The model and its engine, which is started. Closing it is left to the stack."""
    from miles.api import ConfigError
    from miles.build import context_limit
    from miles.modeling import end_token_ids
    from miles_serve.service import Service

    config, registry = resolved.config, resolved.registry
    registry.plugins.hook.miles_configure(config=config)
    model, engine = await _started(resolved, wishes, stack)
    if not engine.generates:
        raise ConfigError(f"--engine {config.rollout.engine.name}: it generates nothing that could be served")
    limits = [limit for limit in (context_limit(config, model), getattr(engine, "max_len", None)) if limit]
    if not limits:
        raise ConfigError("neither the model nor the engine says how long a sequence may be: --rollout-max-context-len")
    ends = (model.tokenizer.eos_token_id, *end_token_ids(model.checkpoint))
    return Service(
        engine=engine,
        chat=model.chat,
        tokenizer=model.tokenizer,
        hf_config=model.hf_config,
        model=wishes.name,
        model_path=str(model.checkpoint),
        context_length=min(limits),
        end_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
        chat_with=partial(_chat_with, resolved, model),
        api_key=wishes.api_key,
        incremental=wishes.incremental,
        version=(await engine.health()).weight_version,
    )


async def _started(resolved: Resolved, wishes: Wishes, stack: AsyncExitStack) -> tuple[Model, Any]:
    """The model and the engine that holds its weights: those of Hugging Face, or, by way of the trainer, of a run."""
    from miles.api import ConfigError
    from miles.build import evaluation_parts
    from miles.checkpoint import find_checkpoint

    checkpoint = None if wishes.run is None else find_checkpoint(Path(wishes.checkpoint))
    try:
        parts = await evaluation_parts(resolved.config, resolved.registry, stack, checkpoint)
    except ConfigError as error:
        if wishes.run is not None:  # whose settings nobody has written now
            written = wishes.run / "config.yaml"
            error.add_note(f"settings come from {written}, with paths from where the run was started")
            error.add_note("serve from that folder, or say where the model is: --hf-checkpoint FOLDER")
        raise
    return parts.model, parts.front.engines[0]


def _chat_with(resolved: Resolved, model: Model, options: Mapping[str, Any]) -> ChatFormat:
    """The chat format with other options of its template."""
    from miles.modeling import chat_format_for, end_token_ids

    data = resolved.config.data
    told = data.model_copy(update={"chat_template_kwargs": {**data.chat_template_kwargs, **options}})
    config = resolved.config.model_copy(update={"data": told})
    ends = end_token_ids(model.checkpoint)
    return chat_format_for(resolved.registry, config, model.hf_config, model.tokenizer, ends)
