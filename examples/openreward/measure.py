"""How many episodes a second the adapter and the SDK's server manage, with a policy that needs no model.

    python measure.py --episodes 512

Each episode is a game of HigherLower, begun in the middle: one call or two, 1.7 on average, in a session of its own.
The server runs in a process of its own; the client's share of a processor is what an episode costs a run.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from games import WIDTH
from miles_openreward.environment import OpenReward
from miles_openreward.plugin import OpenRewardOptions
from miles_openreward.prepare_tasks import EnvironmentConfig, rows_of

from miles.api import Action, Prompt, ToolCall

AT_ONCE = (1, 16, 64, 256)


async def episode(url: str, row: dict) -> float | None:
    """A game by halving; what its last step paid."""
    environment = OpenReward(OpenRewardOptions(base_url=url))
    low = row["metadata"]["task_spec"]["lowest"]
    high = low + WIDTH - 1
    try:
        await environment.reset(Prompt("measure:0", "measure", metadata=row["metadata"]))
        while True:
            guess = (low + high) // 2
            step = await environment.step(Action("", tool_calls=(ToolCall("guess", {"number": guess}, "call_0"),)))
            if step.done:
                return step.reward
            low, high = (guess + 1, high) if step.messages[0]["content"] == "higher" else (low, guess - 1)
    finally:
        await environment.close()


async def measure(url: str, episodes: int) -> None:
    rows = await rows_of("HigherLower", EnvironmentConfig(base_url=url), "train", seed=0)
    await asyncio.gather(*(episode(url, row) for row in rows))  # connections are there, caches warm
    print("at once  episodes/s  ms of our processor time an episode")
    for at_once in AT_ONCE:
        places = asyncio.Semaphore(at_once)

        async def one(number: int, places: asyncio.Semaphore = places) -> float | None:
            async with places:
                return await episode(url, rows[number % len(rows)])

        started, used = time.perf_counter(), time.process_time()
        paid = await asyncio.gather(*map(one, range(episodes)))
        seconds, used = time.perf_counter() - started, time.process_time() - used
        assert paid == [1.0] * episodes, "a game was lost, which halving never does"
        print(f"{at_once:7}  {episodes / seconds:10.0f}  {1000 * used / episodes:35.1f}")


@contextmanager
def served(seconds: float = 60) -> Iterator[str]:
    """Address of games.py, in a process of its own, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("games.py")), "--port", str(address[1])])
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(address, 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield f"http://{address[0]}:{address[1]}"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=512, help="for each line")
    args = parser.parse_args()
    with served() as url:
        asyncio.run(measure(url, args.episodes))


if __name__ == "__main__":
    main()
