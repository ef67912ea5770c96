"""What miles adds to SGLang: finished samples through miles against a bare client that posts the same bytes.

    python scripts/gpu/sglang_throughput.py [--shape 0.6B] [--rounds 5] [--flags="--attention-backend fa3"]
    python scripts/gpu/sglang_throughput.py --device cpu --server canned --shape tiny   # what the client alone costs
    python scripts/gpu/sglang_throughput.py --device cpu --server miles --shape tiny --workloads 64x16x16

A workload is REQUESTSxPROMPTxNEW: that many requests of prompts of so many random tokens, in groups of eight, and so
many new tokens each; the model has no token that ends a response. One server serves three sides, which take turns in
another order every round, its cache flushed before each:

    bare     one asynchronous client (aiohttp) that posts ready-made bodies and reads replies without parsing them
    driver   miles: groups of samples through task, generate function and `sglang_external` in this process
    worker   the same with the engine in a worker process (executor `local`)

The bare client's bodies are those that the driver side sent to a server of canned replies beforehand; afterwards
that is repeated with both sides of miles and compared byte by byte. All sides hold at most `--concurrency` requests in
flight. Each round's tokens are counted. Processor time is that of the process, or of both with a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector
from cases import Book, descendants, out_folder, processor_seconds, run_process, tail
from miles_sglang.engine import SGLangEngine
from servers import serving
from shapes import make_checkpoint

from miles.build import load_model
from miles.config import Spec
from miles.config.load import resolve
from miles.crew import closing, engine_setup, make_crew, make_engine
from miles.plugins import load_plugins
from miles.protocols import ExecutorContext, Seats
from miles.rollout.concurrent import run_all
from miles.rollout.engine_worker import WORKER, remote_engines
from miles.rollout.engines import EngineFront
from miles.rollout.task import Task
from miles.types import Group, Prompt, Sample, Status
from miles.workers.garbage import settle

GROUP = 8
RID = re.compile(rb'"rid": ?"[^"]*"')
"""A request's id on the server; no two of an engine's life are equal (those of the driver's side are made so)."""
SIDES = ("bare", "driver", "worker")
FLAGS = {
    "sglang": "--attention-backend triton --mem-fraction-static 0.6 --cuda-graph-max-bs-decode 512",
    "miles": "--device cpu",
    "canned": "",
}


@dataclass(frozen=True)
class Workload:
    requests: int
    prompt: int
    new: int

    @classmethod
    def read(cls, text: str) -> Workload:
        return cls(*(int(number) for number in text.split("x")))

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt}x{self.new}"


class Miles:
    """miles' side: the path of a rollout, from prompts to finished samples, on one running server."""

    def __init__(self, checkpoint: Path, run_dir: Path, workload: Workload, concurrency: int):
        task_set = {"sampling": {"temperature": 1.0, "max_new_tokens": workload.new}}
        settings = {
            "run": {"dir": str(run_dir)},
            "model": {"hf_checkpoint": str(checkpoint)},
            "data": {"sets": [{**task_set, "path": "made-up", "generate": "single_turn", "reward": "exact_match"}]},
            "rollout": {"engine": {"name": "sglang_external", "urls": "127.0.0.1:1"}},
            "resources": {"device": "cpu"},  # of this process; the server has its own
        }
        resolved = resolve([settings], ("--weight-sync", "disk"), load_plugins(), purpose="show")
        self.config, self.registry, self.checkpoint = resolved.config, resolved.registry, checkpoint
        self.model = load_model(self.config, self.registry)
        self.workload, self.concurrency = workload, concurrency
        draw, vocabulary = random.Random(0), self.model.hf_config.vocab_size
        self.prompts = [
            Prompt(f"made-up:{i}", "default", text="", tokens=draw.choices(range(vocabulary), k=workload.prompt))
            for i in range(workload.requests // GROUP)
        ]

    async def engine(self, side: str, url: str, stack: AsyncExitStack) -> Any:
        """A client of the server, in this process or in a worker; it ends with `stack`."""
        crew = make_crew(self.config, self.registry, stack, trains=False)
        spec = Spec(name="sglang_external", options={"urls": url})
        setup = engine_setup(crew, spec, self.checkpoint, load_weights=True)
        if side == "driver":
            return await make_engine(crew, setup)
        context = ExecutorContext({"rollout": Seats(1)}, self.config.run.dir)
        executor = self.registry.build("executors", Spec(name="local"), context=context)
        closing(stack, executor)
        engine = (await remote_engines(await executor.launch("rollout", WORKER, setup)))[0]
        closing(stack, engine)
        await engine.start()
        return engine

    async def samples(self, engine: Any) -> list[Sample]:
        """All of the workload, finished."""
        if isinstance(engine, SGLangEngine):  # in this process: ids of requests begin anew, and so are the same again
            assert engine._sender is not None
            engine._sender._name, engine._sender._sent = "measured", 0
        front = EngineFront([engine], self.concurrency)
        task = Task(self.config.data.sets[0], self.config, self.registry, front, self.model.chat)
        task.rewards = []
        task.context = replace(task.context, sampling=replace(task.context.sampling, stop_token_ids=()))
        groups = []
        for index, prompt in enumerate(self.prompts):
            names = range(index * GROUP, (index + 1) * GROUP)
            groups.append(Group(index, prompt, [Sample.begin(prompt, id=i, group_id=index, seed=i) for i in names]))
        await run_all(task.run_group(group, 1, lambda sample, attempt: 0) for group in groups)
        return [sample for group in groups for sample in group.samples]


def count_samples(samples: Sequence[Sample]) -> int:
    """New tokens of finished samples.

    Raises:
        ValueError: one of them failed, or lacks a log-probability.
    """
    for sample in samples:
        if sample.status is not Status.TRUNCATED:
            raise ValueError(f"sample {sample.id} is {sample.status}: {sample.error}")
        if not (sample.columns["rollout_log_probs"][sample.prompt_length :] < 0).all():
            raise ValueError(f"sample {sample.id} lacks log-probabilities")
    return sum(sample.response_length for sample in samples)


async def post_all(url: str, bodies: Sequence[bytes], concurrency: int) -> list[bytes]:
    """The bare client."""
    slots = asyncio.Semaphore(concurrency)
    headers = {"Content-Type": "application/json"}

    async def post(session: ClientSession, body: bytes) -> bytes:
        async with slots, session.post(f"{url}/generate", data=body, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.read()

    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as session:
        return await asyncio.gather(*(post(session, body) for body in bodies))


def count_replies(replies: Sequence[bytes]) -> int:
    return sum(len(json.loads(reply)["output_ids"]) for reply in replies)


async def recorded(miles: Miles, side: str, canned: str) -> list[bytes]:
    """The bodies that a side of miles sends, in their order."""
    async with AsyncExitStack() as stack:
        engine = await miles.engine(side, canned, stack)
        await taken(canned)
        count_samples(await miles.samples(engine))
        return await taken(canned)


async def taken(canned: str) -> list[bytes]:
    async with ClientSession() as session, session.get(f"{canned}/recorded") as answer:
        return [base64.b64decode(body) for body in json.loads(await answer.read())]


def without_ids(bodies: Sequence[bytes]) -> list[bytes]:
    return sorted(RID.sub(b'"rid": ""', body) for body in bodies)


async def timed(
    work: Callable[[], Awaitable[Any]], count: Callable[[Any], int], worker: int | None, url: str
) -> dict[str, float]:
    """One round of one side."""
    async with ClientSession() as session, session.post(f"{url}/flush_cache?timeout=20") as answer:
        answer.raise_for_status()  # it waits until the server is idle
    await asyncio.sleep(0.3)
    gc.collect()
    before, processor, wall = processor_seconds(worker) if worker else 0.0, time.process_time(), time.perf_counter()
    result = await work()
    seconds, busy = time.perf_counter() - wall, time.process_time() - processor
    if worker:
        busy += processor_seconds(worker) - before
    return {"seconds": seconds, "processor": busy, "tokens": float(count(result))}


async def measure(arguments: argparse.Namespace, checkpoint: Path, url: str, workload: Workload) -> dict[str, Any]:
    """A workload on a running server."""
    logs = out_folder()
    miles = Miles(checkpoint, logs / "throughput", workload, arguments.concurrency)
    async with AsyncExitStack() as stack:
        flags = ["--upstream", url, "--token", str(miles.model.hf_config.vocab_size - 1)]
        canned = await stack.enter_async_context(serving("canned", checkpoint, logs / "canned.log", flags))
        bodies = await recorded(miles, "driver", canned)
        engines = {side: await miles.engine(side, url, stack) for side in SIDES[1:]}
        [worker] = [pid for pid, words in descendants(os.getpid()).items() if "miles.workers.serve" in words]
        works: dict[str, tuple[Any, Any, int | None]] = {
            "bare": (lambda: post_all(url, bodies, arguments.concurrency), count_replies, None),
            "driver": (lambda: miles.samples(engines["driver"]), count_samples, None),
            "worker": (lambda: miles.samples(engines["worker"]), count_samples, worker),
        }
        settle()  # as a run does when it is built
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(-1 if workload is arguments.workloads[0] else 0, arguments.rounds):
            found = {}
            for place in range(len(SIDES)):
                side = SIDES[(place + number) % len(SIDES)]
                found[side] = await timed(*works[side], url)
            if number >= 0:  # the first one warms up
                rounds.append(found)
            said = ", ".join(f"{side} {found[side]['tokens'] / found[side]['seconds']:,.0f}" for side in SIDES)
            print(f"{workload}: {said} tokens/s", flush=True)
        again = {side: await recorded(miles, side, canned) for side in SIDES[1:]}
    figures = summary(workload, rounds)
    figures["bytes_equal"] = {side: sorted(again[side]) == sorted(bodies) for side in again}
    figures["bytes_equal_but_for_ids"] = {side: without_ids(again[side]) == without_ids(bodies) for side in again}
    figures["body_bytes"] = len(bodies[0])
    figures["body"] = bodies[0].decode()[:400]
    return figures


def summary(workload: Workload, rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"rounds": rounds, "expected_tokens": workload.requests * workload.new}
    for side in SIDES:
        mine = [found[side] for found in rounds]
        speeds = sorted(found["tokens"] / found["seconds"] for found in mine)
        figures[side] = {
            "tokens_per_second": median(speeds),
            "least": speeds[0],
            "most": speeds[-1],
            "ratio": median(
                found[side]["tokens"] / found[side]["seconds"] * found["bare"]["seconds"] / found["bare"]["tokens"]
                for found in rounds
            ),
            "processor_us_per_request": 1e6 * median(found["processor"] for found in mine) / workload.requests,
            "us_per_request": 1e6 * median(found["seconds"] for found in mine) / workload.requests,
            "all_tokens": all(found["tokens"] == workload.requests * workload.new for found in mine),
        }
    return figures


def sglangs_own(arguments: argparse.Namespace, checkpoint: Path, url: str, workload: Workload) -> dict[str, Any]:
    """SGLang's own benchmark on the same server: for information, as it makes bodies of its own."""
    result, log = out_folder() / f"bench_serving_{workload}.jsonl", out_folder() / f"bench_serving_{workload}.log"
    result.unlink(missing_ok=True)
    words = (
        f"-m sglang.bench_serving --backend sglang --base-url {url} --model {checkpoint} --tokenizer {checkpoint} "
        f"--dataset-name random-ids --tokenize-prompt --num-prompts {workload.requests} "
        f"--random-input-len {workload.prompt} --random-output-len {workload.new} --random-range-ratio 1.0 "
        f"--max-concurrency {arguments.concurrency} --disable-stream --return-logprob --flush-cache --disable-tqdm "
        f"--output-file {result}"
    )
    code, seconds = run_process([sys.executable, *words.split()], log, 60)
    if code or not result.exists():
        return {"error": f"status {code}", "said": tail(log, 12), "seconds": seconds}
    return {"tokens_per_second": json.loads(result.read_text().splitlines()[-1])["output_throughput"]}


async def session(arguments: argparse.Namespace, book: Book, folder: Path) -> None:
    checkpoint = folder / arguments.shape
    canned = arguments.server == "canned"
    config = make_checkpoint(checkpoint, arguments.shape, arguments.device, weights=not canned, ends=False)
    log = out_folder() / f"server_{arguments.server}.log"
    flags = arguments.flags.split()
    if canned:
        flags += ["--token", str(config.vocab_size - 1)]
    async with serving(arguments.server, checkpoint, log, flags) as url:
        for workload in arguments.workloads:
            start = time.perf_counter()
            try:
                figures = await asyncio.wait_for(measure(arguments, checkpoint, url, workload), arguments.limit)
            except Exception as error:
                print(f"{workload}: {type(error).__name__}: {error}\n{tail(log, 8)}", flush=True)
                figures = {"error": f"{type(error).__name__}: {error}"}
            book.note(str(workload), {**figures, "case_seconds": time.perf_counter() - start})
        for workload in arguments.workloads if arguments.server == "sglang" and arguments.own else ():
            own = await asyncio.to_thread(sglangs_own, arguments, checkpoint, url, workload)
            book.note(f"bench_serving {workload}", own)


def table(book: Book) -> list[list[Any]]:
    heads = (
        "side, tokens/s, least, most, of bare, us a request, processor us a request, every token, same bytes, but ids"
    )
    rows: list[list[Any]] = [["requests x prompt x new", *heads.split(", ")]]
    for name, figures in book.figures.items():
        if name == "versions":
            continue
        if "bare" not in figures:
            rows.append([name, "", figures.get("tokens_per_second"), *[None] * 7, figures.get("error", "")[:300]])
            continue
        for side in SIDES:
            shown = [figures[side][key] for key in ("tokens_per_second", "least", "most", "ratio", "us_per_request")]
            shown += [figures[side]["processor_us_per_request"], figures[side]["all_tokens"]]
            shown += [figures[key].get(side) for key in ("bytes_equal", "bytes_equal_but_for_ids")]
            rows.append([name, side, *shown])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=FLAGS, default="sglang")
    parser.add_argument("--flags", help="of the server, in one string")
    parser.add_argument("--shape", default="0.6B")
    parser.add_argument("--device", default="cuda", help="where the model's weights are drawn")
    parser.add_argument("--workloads", nargs="+", type=Workload.read, default=["1024x128x128", "512x128x1024"])
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds for a workload")
    parser.add_argument("--no-own", dest="own", action="store_false", help="leave SGLang's own benchmark out")
    arguments = parser.parse_args()
    arguments.workloads = [Workload.read(w) if isinstance(w, str) else w for w in arguments.workloads]
    arguments.flags = FLAGS[arguments.server] if arguments.flags is None else arguments.flags
    book = Book(f"throughput_{arguments.server}")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(session(arguments, book, Path(folder)))
    book.show(table(book))


if __name__ == "__main__":
    main()
