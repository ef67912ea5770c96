"""What a turn costs in the session gateway (miles-gateway), beside the model: many sessions at once, an engine that
answers at once, and clients in a process of their own.

    python scripts/gateway_overhead.py --sessions 1000 --turns 8

Prints the processor time of this process for each turn: HTTP, JSON, rendering, reading, recording, and its share of the
sample at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from miles.api import GenerateContext, GenerateRequest, GenerateResult, Prompt, Sample, SamplingParams
from miles.config import Spec
from miles.testing import tiny
from miles.testing.contract import installed

ANSWER = "hello hello you, hello hello you"
PROMPT = [{"role": "user", "content": "hello " * 60}]
TOOL = "a tool says: " + "hello " * 20


async def converse(base_url: str, turns: int) -> None:
    """The clients' side: a conversation over one connection, as bytes."""
    url = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    messages: list[dict[str, Any]] = list(PROMPT)
    for _ in range(turns):
        body = json.dumps({"model": "policy", "messages": messages, "temperature": 1.0, "max_tokens": 64}).encode()
        head = f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answered = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in answered.split(b"\r\n") if line.lower().startswith(b"content-length"))
        reply = json.loads(await reader.readexactly(int(length.split(b":")[1])))
        messages += [reply["choices"][0]["message"], {"role": "user", "content": TOOL}]
    writer.close()


async def clients() -> None:
    """Reads `URL TURNS` a line, and writes each URL back when its conversation is over."""
    loop = asyncio.get_running_loop()
    source = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(source), sys.stdin)
    underway: set[asyncio.Task] = set()

    async def one(url: str, turns: int) -> None:
        await converse(url, turns)
        print(url, flush=True)

    while line := await source.readline():
        url, turns = line.decode().split()
        task = asyncio.create_task(one(url, int(turns)))
        underway.add(task)
        task.add_done_callback(underway.discard)


class Desk:
    """Hands conversations to the clients' process. Its method is the agent."""

    def __init__(self, turns: int):
        self.turns = turns
        self.waiting: dict[str, asyncio.Future] = {}

    async def open(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--clients", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.waiting.pop(line.decode().strip()).set_result(None)

    async def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.reading.cancel()
        await self.process.wait()

    async def agent(self, base_url: str, prompt: Any, request_kwargs: Any, metadata: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        done = self.waiting[base_url] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(f"{base_url} {self.turns}\n".encode())
        await done
        return {"reward": 1.0}


DESK: Desk


async def through_desk(base_url: str, prompt: Any, request_kwargs: Any, metadata: Any) -> dict[str, Any]:
    """The agent of this measurement."""
    return await DESK.agent(base_url, prompt, request_kwargs, metadata)


async def measure(sessions: int, turns: int, rounds: int) -> None:
    global DESK
    sys.modules.setdefault("gateway_overhead", sys.modules[__name__])
    chat = tiny.chat_format(installed())
    answer = [*chat.render_text(ANSWER), chat.stop_token_ids[0]]

    async def engine(request: GenerateRequest) -> GenerateResult:
        return GenerateResult(list(answer), [-1.0] * len(answer), "stop", [1] * len(answer))

    DESK = Desk(turns)
    await DESK.open()
    function = installed().build(
        "generate_functions", Spec(name="agent", options={"function": "gateway_overhead:through_desk"})
    )
    sampling = SamplingParams(max_new_tokens=64, stop_token_ids=tuple(chat.stop_token_ids))
    prompt = Prompt("made-up:0", "made-up", messages=list(PROMPT), tokens=chat.render_prompt(PROMPT))

    async def one(number: int) -> None:
        sample = Sample.begin(prompt, id=number, group_id=number // 8, seed=number)
        done = await function(GenerateContext(engine, chat, sampling), sample)
        assert len(done.turns) == turns, done.error

    seconds, walls = [], []
    for lap in range(rounds + 1):
        began, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(sessions)))
        if not lap:  # the first one warms up; what is there then lives as long as a run
            gc.collect()
            gc.freeze()
        else:
            seconds.append((time.process_time() - began) / (sessions * turns))
            walls.append((time.perf_counter() - wall) / (sessions * turns))
    await DESK.close()
    print(f"{sessions} sessions at once, {turns} turns each, {len(answer)} tokens a turn, {rounds} rounds")
    for name, values in (("processor", seconds), ("wall", walls)):
        each = ", ".join(f"{value * 1e3:.3f}" for value in values)
        print(f"{name}: {statistics.median(values) * 1e3:.3f} ms a turn (each round: {each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    asyncio.run(clients() if given.clients else measure(given.sessions, given.turns, given.rounds))


if __name__ == "__main__":
    main()
