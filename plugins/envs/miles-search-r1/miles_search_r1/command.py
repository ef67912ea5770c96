"""`miles search index CORPUS` and `miles search serve INDEX`."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from miles.api import ConfigError
from miles.cli import Call

if TYPE_CHECKING:
    from aiohttp.web import Application

HELP = """usage: miles search index CORPUS --out FOLDER [--model NAME]
       miles search serve FOLDER [--port 8000]

`index` embeds the passages of a JSONL file, {"id", "contents"} or {"title", "text"} a line, and writes a FAISS index.
  --out FOLDER            where to
  --model NAME            embedding model: a name on the Hugging Face hub, a folder, or wordllama [intfloat/e5-base-v2]
  --query-prefix TEXT     what it expects before queries [by its name: `query: ` for E5, else nothing]
  --passage-prefix TEXT   and before passages [likewise]
  --pooling HOW           mean, or cls: the first token [mean]
  --max-length N          tokens of a passage or query; the rest is cut off [512]
  --kind KIND             of FAISS' index factory: Flat (exact), HNSW32, IVF4096,Flat, IVF4096,SQ8 ... [Flat]
  --train-size N          passages by which kinds with clusters find theirs [200000]
  --batch-size N          passages embedded at once [256]
  --device DEVICE         where the model runs: cpu, cuda [cpu]
`serve` answers POST /retrieve {"queries": [...], "topk": 3, "return_scores": true}, until SIGINT or SIGTERM.
  --host HOST             where to listen [127.0.0.1: this machine only]
  --port PORT             0 takes one that is free [8000]
  --topk N                passages where a request does not say [3]
  --max-batch-size N      queries embedded at once [256]
  --corpus FILE           where the corpus is now, if it was moved
  --memory-map            leave the vectors on disk
  --parameters LIST       of the search, as FAISS spells them: nprobe=32, efSearch=64
  --device DEVICE         where the model runs: cpu, cuda [cpu]"""

LARGEST_PORT = 65535
STEPS = 20
"""Lines of progress while an index is built."""
Value = TypeVar("Value")


def run(call: Call) -> int:
    """Make an index, or serve one until a signal asks to stop."""
    if call.help or not call.words:
        print(HELP)
        return 0 if call.help else 2
    what = call.words.pop(0)
    if what not in ("index", "serve"):
        raise ConfigError(f"miles search {what}: `index` or `serve` is expected; `miles search --help` says more")
    if not call.words or call.words[0].startswith("-"):
        raise ConfigError(f"miles search {what} needs a {'corpus' if what == 'index' else 'folder'} to begin with")
    path = Path(call.words.pop(0))
    if what == "index":
        _index(call, path)
    else:
        _serve(call, path)
    return 0


def _index(call: Call, corpus: Path) -> None:
    from miles_search_r1.embedding import Embedding, prefixes_of
    from miles_search_r1.index import Building, build_index

    out = _value(call, "--out", str, "")
    model = _value(call, "--model", str, "intfloat/e5-base-v2")
    query, passage = prefixes_of(model)
    embedding = Embedding(
        model,
        query_prefix=_value(call, "--query-prefix", str, query),
        passage_prefix=_value(call, "--passage-prefix", str, passage),
        pooling=_value(call, "--pooling", str, "mean"),  # type: ignore[arg-type]
        max_length=_value(call, "--max-length", int, 512),
    )
    how = Building(
        kind=_value(call, "--kind", str, "Flat"),
        batch_size=_value(call, "--batch-size", int, 256),
        train_size=_value(call, "--train-size", int, 200_000),
        device=_value(call, "--device", str, "cpu"),
    )
    _nothing_left(call)
    if not out:
        raise ConfigError("miles search index: --out FOLDER says where the index goes")
    shown = -1

    def say(done: int, of: int) -> None:
        nonlocal shown
        if done * STEPS // of > shown:
            shown = done * STEPS // of
            print(f"{done} of {of} passages", file=sys.stderr, flush=True)

    index = build_index(corpus, Path(out), embedding, how, say)
    print(f"{len(index)} passages of {corpus}, embedded by {model}: {how.kind} in {out}")


def _serve(call: Call, folder: Path) -> None:
    from miles_search_r1.index import load_index
    from miles_search_r1.server import make_app

    host, port = _value(call, "--host", str, "127.0.0.1"), _value(call, "--port", int, 8000)
    topk, size = _value(call, "--topk", int, 3), _value(call, "--max-batch-size", int, 256)
    corpus, device = _value(call, "--corpus", str, ""), _value(call, "--device", str, "cpu")
    memory_map, parameters = call.take("--memory-map"), _value(call, "--parameters", str, "")
    _nothing_left(call)
    if port > LARGEST_PORT:
        raise ConfigError(f"--port {port}: at most {LARGEST_PORT}")
    moved = Path(corpus) if corpus else None
    index = load_index(folder, corpus=moved, device=device, memory_map=memory_map, parameters=parameters)
    asyncio.run(_until_stopped(make_app(index, topk, size), host, port, len(index)))


async def _until_stopped(app: Application, host: str, port: int, passages: int) -> None:
    from miles_search_r1.server import listening

    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        async with listening(app, host, port) as url:
            print(f"miles: {passages} passages at {url}/retrieve", flush=True)
            await stopped.wait()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error


def _value(call: Call, flag: str, kind: Callable[[str], Value], default: Value) -> Value:
    """Raises ConfigError for a number that is none, or not a positive one (a port may be 0)."""
    given = call.take_value(flag)
    if given is None:
        return default
    if (kind is int and not given.isdecimal()) or (given == "0" and flag != "--port"):
        raise ConfigError(f"{flag} {given}: a positive whole number is expected")
    return kind(given)


def _nothing_left(call: Call) -> None:
    if call.words:
        raise ConfigError(
            f"miles search: {call.words[0]!r} is not known here, or has no value; see miles search --help"
        )
