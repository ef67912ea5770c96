"""Weights from a trainer to the SGLang server that shares its GPU: seconds, GB/s, and what they are made of.

    python scripts/gpu/sglang_sync.py 0.6B 4B 8B [--buckets 512 128 1024] [--repeats 4] [--flags "--sglang-KEY VALUE"]
    python scripts/gpu/sglang_sync.py tiny --device cpu --buckets 1 4

Every shape has a process of its own: the train backend `fsdp` in bf16 with random weights, the engine `sglang` beside
it (executor inprocess), taking turns as in a colocated run; without an optimizer, which takes no part in this and would
leave no room for 8B. For every size of bucket (MiB), weights are sent `--repeats` times, the very first time with
whatever is set up by it. Before each, a fifth of every matrix is drawn anew, and after it trainer and engine score the
same random tokens: `probe` is how far they are apart, `stirred` how far the trainer is from what it said before, which
is what the probe would show of weights that did not arrive.

    push      the whole weight sync; `receive` of it in the engine
    post      waiting for the server to take buckets; `version` and `flush` for its answers to these
    walk      for comparison: the same buckets made of the trainer's weights, nothing sent
    of copy   for comparison: four bytes read or written for each byte of weights (into a bucket, and out of it) against
              those that a copy of 4 GiB on the device reads and writes, measured in this process

Afterwards the engine sleeps and wakes in parts: seconds, and GiB given back to the device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
import torch
from cases import Book, GpuWatch, keep_logs, options_of, out_folder, run_process, tail
from main_job import RECIPE, make_problems, overlay, synchronize
from miles_sglang.weights import hand_over
from servers import THROUGH_MILES
from shapes import make_checkpoint
from training import drawn_weights

from miles.build import build
from miles.builtins.fsdp import backend as fsdp
from miles.config.load import resolve
from miles.determinism import prepared_process
from miles.plugins import load_plugins
from miles.run import Run
from miles.toolkit import pack
from miles.tracking import Tracking

MIB, GIB = 2**20, 2**30
PATHS = {
    "/update_weights_from_tensor": "post",
    "/update_weights_from_disk": "post",
    "/update_weight_version": "version",
    "/flush_cache": "flush",
}
SERVER_FLAGS = (
    "--sglang-attention-backend triton --sglang-mem-fraction-static 0.3 --sglang-max-total-tokens 65536 "
    "--sglang-cuda-graph-max-bs-decode 32"
)
DEVIATION = 0.05
HERE = "sglang_sync"
"""This module, for what runs where the weights are."""


# ------------------------------------------------------------------------------------------- in the trainer's process


@torch.no_grad()
def stir(weights: Iterable[Mapping[str, torch.Tensor]], seed: int) -> int:
    """Draw every matrix anew, in place: all of it with seed 0, else a fifth of each row; the bytes of all weights."""
    total, every = 0, 5 if seed else 1
    for group in weights:
        for tensor in group.values():
            total += tensor.nbytes
            if tensor.ndim > 1:
                generator = torch.Generator(tensor.device).manual_seed(seed)
                part = tensor[..., seed % every :: every]
                part.copy_(torch.randn(part.shape, device=tensor.device, generator=generator) * DEVIATION)
    synchronize()
    return total


@torch.no_grad()
def walk(weights: Iterable[dict[str, torch.Tensor]], bucket_bytes: int) -> float:
    """Seconds to make buckets of all weights, and send none."""
    synchronize()
    start = time.perf_counter()
    for _ in pack(weights, bucket_bytes):
        pass
    synchronize()
    return time.perf_counter() - start


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty((4 * GIB if device.startswith("cuda") else 64 * MIB) // 4, device=device).normal_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    synchronize()
    return 10 * 2 * source.nbytes / (time.perf_counter() - start)


# --------------------------------------------------------------------------------------------------------- one shape


class Requests:
    """Seconds of every answer that a server of ours gave, by what was asked."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._plain = aiohttp.ClientSession._request

    def __enter__(self) -> Requests:
        async def watched(session: Any, method: str, url: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            answer = await self._plain(session, method, url, **kwargs)
            await answer.read()  # SGLang's answers to these are a line each
            self.seconds[PATHS.get(answer.url.path, "other")].append(time.perf_counter() - start)
            return answer

        aiohttp.ClientSession._request = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        aiohttp.ClientSession._request = self._plain  # type: ignore[method-assign]

    def take(self) -> dict[str, list[float]]:
        taken, self.seconds = dict(self.seconds), defaultdict(list)
        return taken


def timed(function: Callable, into: list[float]) -> Callable:
    async def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return await function(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - start)

    return call


def settings_of(arguments: argparse.Namespace, folder: Path, shape: str) -> dict[str, Any]:
    make_checkpoint(folder / "model", shape, weights=arguments.device == "cpu")  # a stand-in for SGLang reads them
    make_problems(folder)
    settings = overlay(
        folder,
        folder / "run",
        16,
        rollout={"num_rollout": 1},
        train={"gradient_checkpointing": False},
        weight_sync={"verify": "always", "tolerance": 1e9},  # what is too much, the table shows
    )
    settings["data"]["sets"][0]["reward"] = "main_job:even"
    return settings


async def measure(arguments: argparse.Namespace, folder: Path, shape: str) -> dict[str, Any]:
    settings = settings_of(arguments, folder, shape)
    words = ["--rollout-engine", arguments.engine, "--device", arguments.device, "--executor", "inprocess"]
    words += f"{THROUGH_MILES} {arguments.flags}".split() if arguments.engine == "sglang" else []
    resolved = resolve([RECIPE / "config.yaml", settings], words, load_plugins())
    config, registry = resolved.config, resolved.registry
    fsdp.initial_weights = partial(drawn_weights, arguments.device)
    fsdp.FsdpBackend._make_optimizer = lambda backend: None  # type: ignore[method-assign]
    figures: dict[str, Any] = {"copy_bytes_per_second": copy_rate(arguments.device)}
    start = time.perf_counter()
    with prepared_process(config.run):
        async with AsyncExitStack() as stack:
            derived, parts = await build(config, registry, Tracking([]), stack)
            figures["build_seconds"] = time.perf_counter() - start
            run = Run(config, derived, parts)
            async with run.residency.training():
                figures["bytes"] = (await parts.workers.call("send_weights", f"{HERE}:stir", 0))[0]
            figures["syncs"] = await syncs(arguments, run, folder)
            figures["moves"] = [await naps(run.parts.engines[0]) for _ in range(2)]
    return figures


async def syncs(arguments: argparse.Namespace, run: Run, folder: Path) -> list[dict[str, Any]]:
    """Every size of bucket, several times."""
    parts, found, before = run.parts, list[dict[str, Any]](), None
    pushes, receives = list[float](), list[float]()
    parts.weight_sync.push = timed(parts.weight_sync.push, pushes)  # type: ignore[method-assign]
    engine = parts.engines[0]
    engine.receive = timed(engine.receive, receives)  # type: ignore[method-assign]
    with Requests() as requests:
        for mib in arguments.buckets:
            use_bucket(int(mib * MIB))
            for repeat in range(arguments.repeats):
                run.step += 1
                async with run.residency.training():
                    await parts.workers.call("send_weights", f"{HERE}:stir", run.step)
                    [alone] = await parts.workers.call("send_weights", f"{HERE}:walk", int(mib * MIB))
                    assert parts.probe is not None
                    now = await parts.probe.trainer(parts.workers)
                requests.take()
                metrics = await run.push_weights()
                answers = requests.take()
                found.append(
                    {
                        "bucket_mib": mib,
                        "repeat": repeat,
                        "push": pushes[-1],
                        "receive": receives[-1],
                        "walk": alone,
                        **{name: sum(answers.get(name, [])) for name in ("post", "version", "flush")},
                        "buckets": len(answers.get("post", [])),
                        "largest_post": max(answers.get("post", [0.0])),
                        "bytes": metrics["weight_sync/bytes"],
                        "probe": metrics["weight_sync/logprob_abs_diff"],
                        "stirred": None if before is None else float(np.abs(now - before).mean()),
                    }
                )
                before = now
                (folder / "so_far.json").write_text(json.dumps(found))
    return found


def use_bucket(nbytes: int) -> None:
    """Have the engine of this process send buckets of this size."""
    assert hand_over.__kwdefaults__["limit"]
    hand_over.__kwdefaults__["limit"] = nbytes


async def naps(engine: Any) -> dict[str, list[float]]:
    """Seconds to let go of each part and to take it back, and how many GiB the device has more for it."""
    found = {}
    for verb, order in (("sleep", ("kv_cache", "graphs", "weights")), ("wake", ("weights", "kv_cache", "graphs"))):
        for part in order:
            before, start = free_bytes(), time.perf_counter()
            await getattr(engine, verb)(frozenset({part}))
            seconds = time.perf_counter() - start
            found[f"{verb} {part}"] = [seconds, (free_bytes() - before) / GIB]
    return found


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


# --------------------------------------------------------------------------------------------------------- the parent


def run_shape(shape: str, arguments: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=f"sync-{shape}-") as name:
        folder, log, watch = Path(name), out_folder() / f"sync_{shape}.log", GpuWatch()
        with watch.watching():
            command = [sys.executable, __file__, shape, "--child", folder, *rest]
            code, seconds = run_process(command, log, arguments.limit)
        keep_logs(folder / "run", f"sync_{shape}")
        figures: dict[str, Any] = {"code": code, "seconds": seconds, "gpu_peak_mib": watch.peak_mib()}
        if (folder / "figures.json").exists():
            return figures | json.loads((folder / "figures.json").read_text())
        figures |= {"error": f"status {code}", "said": tail(log, 40)}
        if (folder / "so_far.json").exists():
            figures["syncs"] = json.loads((folder / "so_far.json").read_text())
        print(figures["said"], flush=True)
        return figures


def table(book: Book) -> list[list[Any]]:
    """The first sync, then medians of the others, of each size of bucket."""
    names = ("push", "receive", "post", "version", "flush", "walk", "largest_post")
    rows: list[list[Any]] = [
        ["shape", "GB", "bucket MiB", "buckets", "syncs", *names, "GB/s", "of copy", "probe", "stirred"]
    ]
    for shape, figures in book.figures.items():
        if shape == "versions":
            continue
        made = figures.get("syncs", [])
        for mib in dict.fromkeys(sync["bucket_mib"] for sync in made):
            mine = [sync for sync in made if sync["bucket_mib"] == mib]
            for label, chosen in (("first", mine[:1]), (f"next {len(mine) - 1}", mine[1:])):
                if not chosen:
                    continue
                rate = chosen[0]["bytes"] / median(sync["push"] for sync in chosen)
                share = rate * 4 / figures["copy_bytes_per_second"] if "copy_bytes_per_second" in figures else None
                worst, stirred = max(s["probe"] for s in chosen), [s["stirred"] for s in chosen if s["stirred"]]
                cells = [median(sync[name] for sync in chosen) for name in names]
                least = min(stirred) if stirred else None
                rows.append(
                    [
                        shape,
                        chosen[0]["bytes"] / 1e9,
                        mib,
                        chosen[0]["buckets"],
                        label,
                        *cells,
                        rate / 1e9,
                        share,
                        worst,
                        least,
                    ]
                )
        if "error" in figures:
            rows.append([shape, *[None] * (len(rows[0]) - 2), str(figures["error"])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--flags", default=SERVER_FLAGS, help="of SGLang, in one string")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--buckets", type=float, nargs="+", default=[512, 128, 1024], help="MiB")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a shape is killed")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        figures = asyncio.run(measure(arguments, arguments.child, arguments.shapes[0]))
        (arguments.child / "figures.json").write_text(json.dumps(figures))
        return
    rest = options_of(sys.argv[1:])
    book = Book(f"sync_{'_'.join(arguments.shapes)}")
    for shape in arguments.shapes:
        book.case(shape, partial(run_shape, shape, arguments, rest))
    book.show(table(book))
    for shape, figures in book.figures.items():
        if "copy_bytes_per_second" in figures:
            said = f"copy {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s, built in {figures['build_seconds']:.0f} s"
            print(f"{shape}: {said}, peak {max(figures['gpu_peak_mib'] or [0]) / 1024:.1f} GiB")
            for moves in figures["moves"]:
                print("   ", ", ".join(f"{what} {s:.3f} s {gib:+.1f} GiB" for what, (s, gib) in moves.items()))


if __name__ == "__main__":
    main()
