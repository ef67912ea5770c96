"""How fast episodes and searches are, without a model: a scripted policy against the retrieval server.

    python measure.py --corpus data/corpus.jsonl --data data/train.jsonl [--seconds 5]

Episodes: each asks for a name and then answers, through the environment as a run builds it, so many at a time, the
server in a process of its own. Searches: one query a request from so many clients at once, and 64 a request from one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import aiohttp
from miles_search_r1.environment import SearchR1, question_of
from miles_search_r1.plugin import SearchOptions

from miles.api import Action, Prompt


@contextmanager
def server(corpus: Path, *flags: str) -> Iterator[str]:
    """The address of a retrieval server for a corpus."""
    command = [sys.executable, "-m", "miles", "search"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "index"
        subprocess.run(
            [*command, "index", corpus, "--out", out, "--model", "wordllama"], check=True, capture_output=True
        )
        process = subprocess.Popen([*command, "serve", out, "--port", "0", *flags], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait()


async def rate(work: Callable[[int], Awaitable[int]], at_once: int, seconds: float) -> float:
    """What `work` counts, per second, when so many go on side by side for so long."""
    started = time.perf_counter()

    async def keep_on(worker: int) -> int:
        done = 0
        while time.perf_counter() - started < seconds:
            done += await work(worker)
        return done

    done = sum(await asyncio.gather(*map(keep_on, range(at_once))))
    return done / (time.perf_counter() - started)


async def measure(url: str, prompts: list[Prompt], seconds: float) -> None:
    following = cycle(prompts)
    options = SearchOptions(url=url)
    another = SearchR1(options)  # keeps the connections open between episodes, as other trajectories do in a run

    async def episode(_: int) -> int:
        environment, prompt = SearchR1(options), next(following)
        await environment.reset(prompt)
        for said in environment.script(prompt):
            step = await environment.step(said if isinstance(said, Action) else Action(said))
        await environment.close()
        assert step.done
        return 1

    async def retrieve(count: int) -> int:
        queries = [question_of(prompt) for prompt in islice(following, count)]
        async with session.post(url, json={"queries": queries, "topk": 3, "return_scores": True}) as reply:
            assert len((await reply.json())["result"]) == count
        return count

    await another.step(Action("<search>first</search>"))
    for at_once in (1, 16, 128):
        print(f"episodes/s, {at_once:>3} at once        {await rate(episode, at_once, seconds):8.0f}")
    await another.close()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for at_once in (1, 16, 128):
            found = await rate(lambda _: retrieve(1), at_once, seconds)
            print(f"queries/s, {at_once:>3} clients         {found:8.0f}")
        print(f"queries/s, 64 in a request      {await rate(lambda _: retrieve(64), 1, seconds):8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="questions about it, as make_data.py writes them")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    prompts = [
        Prompt(f"measured:{i}", "measured", messages=row["prompt"], label=row["reward_model"])
        for i, row in enumerate(rows)
    ]
    for flags in ((), ("--max-batch-size", "1")):
        print(f"--- {' '.join(flags) or 'queries that wait are answered together'}")
        with server(args.corpus, *flags) as url:
            asyncio.run(measure(url, prompts, args.seconds))


if __name__ == "__main__":
    main()
