"""What the sandbox of miles-retool costs: its start, a call, calls at the same time, episodes of the environment.

    python scripts/sandbox_speed.py [--calls 400] [--packages numpy sympy]

No model: a scripted policy makes one call a trajectory and then answers, through `miles.api.Environments` as in a run.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence

from miles_retool.environment import Retool
from miles_retool.plugin import RetoolOptions
from miles_retool.sandbox.limits import Limits
from miles_retool.sandbox.pool import Sandbox

from miles.api import EnvironmentLimits, Environments, Prompt

COMBINATIONS = {
    "all layers": ("namespaces", "user", "landlock", "seccomp"),
    "user, landlock, seccomp": ("user", "landlock", "seccomp"),
    "no layer": (),
}


async def latencies(sandbox: Sandbox, code: str, calls: int, at_once: int) -> tuple[float, list[float]]:
    """Seconds in all, and of each call with its waiting."""
    places = asyncio.Semaphore(at_once)

    async def one() -> float:
        async with places:
            started = time.perf_counter()
            result = await sandbox.run(code)
            assert not result.failed, result
            return time.perf_counter() - started

    started = time.perf_counter()
    each = await asyncio.gather(*(one() for _ in range(calls)))
    return time.perf_counter() - started, each


async def episodes(number: int, at_once: int) -> float:
    """Episodes a second, each of one program and an answer."""
    made = Environments(build=lambda: Retool(RetoolOptions(require=())), limits=EnvironmentLimits())
    places = asyncio.Semaphore(at_once)

    async def one(i: int) -> None:
        prompt = Prompt(f"speed:{i}", "speed", text="?", label=str(i))
        async with places:
            environment = made()
            await environment.reset(prompt)
            for action in environment.script(prompt):
                step = await environment.step(action)
            assert step.done
            await environment.close()

    await one(-1)
    started = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(number)))
    return number / (time.perf_counter() - started)


def measure(name: str, layers: Sequence[str], packages: Sequence[str], calls: int) -> None:
    """One line: start, first call, median and 95 % of single calls, calls a second at 1 and at 32."""
    sandbox = Sandbox(Limits(), packages=packages, layers=layers, require=())
    started = time.perf_counter()
    sandbox.start()
    start = time.perf_counter() - started
    if missing := sandbox.missing:
        print(f"| {name} | not here: {', '.join(sorted(missing))} |")
        return

    async def main() -> None:
        first, _ = await latencies(sandbox, "print(6 * 7)", 1, 1)
        alone, each = await latencies(sandbox, "print(6 * 7)", calls, 1)
        together, _ = await latencies(sandbox, "print(6 * 7)", calls, 32)
        slow = statistics.quantiles(each, n=20)[-1]
        print(
            f"| {name} | {start:.2f} s | {first * 1e3:.1f} ms | {statistics.median(each) * 1e3:.1f} ms | "
            f"{slow * 1e3:.1f} ms | {calls / alone:.0f} | {calls / together:.0f} |",
            flush=True,
        )

    asyncio.run(main())
    sandbox.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--packages", nargs="*", default=["numpy", "sympy"], help="for the last line")
    args = parser.parse_args()
    print("| layers | start | first call | a call, median | 95 % | calls/s at 1 | calls/s at 32 |")
    print("|---" * 7 + "|")
    for name, layers in COMBINATIONS.items():
        measure(name, layers, (), args.calls)
    measure(f"all layers, {' and '.join(args.packages)}", COMBINATIONS["all layers"], args.packages, args.calls)
    for at_once in (1, 32):
        print(f"episodes/s, {at_once} at once: {asyncio.run(episodes(args.calls, at_once)):.0f}")
