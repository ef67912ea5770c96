"""Asynchronous against synchronous training on the same two GPUs, with SGLang: steps an hour, and what is learned.

    python scripts/gpu/sglang_modes.py [sync async-2 ...] [--steps 17] [--lr 3e-6]
    python scripts/gpu/sglang_modes.py sync async-2 agent --small --device cpu --engine torch      # no GPU

The recipe examples/qwen3-0.6b-grpo at the shape of Qwen3-0.6B with random weights, on made-up problems, rewarded for
even token ids, which the embeddings tell from odd ones. Each sample has a length of its own, log-normal and the same in
every case, so that batches have a tail that somebody waits for. Cases, each a `miles train` with a limit of `--limit`
seconds:

    sync         two train ranks, a server beside each, taking turns
    apart        one GPU trains, one generates, in turns
    one-step     the same, a batch ahead (`one_step_off`)
    async-N      the same, `fully_async` with `--max-weight-staleness N`
    decoupled-N  the same with `--is-correction tis`: clipped by what a step changes, not by how old samples are
    agent        one GPU, taking turns; each sample is an agent that asks twice, with the package `openai`, through the
                 session gateway; no long tail
    agent-async  `async-1` with it

A server that generates for a trainer on another GPU gets 256 requests at a time: SGLang's CUDA graphs reach no further
there by default, and without them a step of such a small model takes several times as long. In `fully_async` it gathers
prompts (`GATHER`): answers end one by one, and a prefill for each prompt that follows one interrupts all others.

Steps an hour are of the steps after `--warm`, without the last one, which saves a checkpoint, and without those for
which no new prompts are begun (N more in `async-N` and `decoupled-N`). So are the seconds of a step and of its phases,
on average, of which `rollout` is how long the trainer waits for a batch. Batches come in bursts of N + 1 there: whole
bursts are counted. `idle` is 1 - utilisation.gpu of NVML in that time, over all GPUs;
`tok/s` is of engines while they generate. `abs_diff` is how far the log-probabilities of trainer and engine are apart,
as in every run; under `fully_async` tokens of older weights count in it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from cases import Book, GpuWatch, keep_logs, out_folder, run_process, tail
from main_job import RECIPE, make_problems, overlay
from servers import THROUGH_MILES
from shapes import make_checkpoint

from miles.api import GenerateContext, Sample
from miles.builtins.generate import single_turn

APART = ("--rollout-num-gpus", "1", "--no-colocate", "--rollout-concurrency", "256")
ASYNC = (*APART, "--rollout-mode", "fully_async", "--max-weight-staleness")
CASES: dict[str, tuple[str, ...]] = {
    "sync": ("--actor-num-gpus-per-node", "2", "--colocate"),
    "apart": APART,
    "one-step": (*APART, "--rollout-mode", "one_step_off"),
    **{f"async-{n}": (*ASYNC, str(n)) for n in (1, 2, 3, 4, 6)},
    **{f"decoupled-{n}": (*ASYNC, str(n), "--is-correction", "tis") for n in (1, 2, 3, 4, 6)},
    "agent": ("--executor", "inprocess", "--colocate"),
    "agent-async": (*ASYNC, "1"),
}
GATHER = ("--sglang-enable-prefill-delayer", "--sglang-prefill-delayer-queue-min-ratio", "0.1")
SMALL = {"batch_size": 4, "n_samples_per_prompt": 4}
PARITY = 0.4
"""Of `make_checkpoint`; other parts of an embedding have a length of 1.6."""
PHASES = ("step", "rollout", "generate", "workers", "move", "sync")
LEARNED = 3
"""Steps over which the reward at the end is averaged."""


@dataclass(frozen=True)
class Lengths:
    """Of responses, in tokens: log-normal."""

    median: int
    sigma: float


async def long_tailed(context: GenerateContext, sample: Sample, *, options: Lengths) -> Sample:
    """One response, as long as the sample's number says; `max_new_tokens` at most."""
    drawn = random.Random(sample.id).lognormvariate(0.0, options.sigma) * options.median
    longest = min(max(round(drawn), 1), context.sampling.max_new_tokens)
    return await single_turn(replace(context, sampling=replace(context.sampling, max_new_tokens=longest)), sample)


async def asks_twice(base_url: str, prompt: Any, request_kwargs: Mapping[str, Any], metadata: Any, **kw: Any) -> None:
    """An agent for the session gateway; the task set judges what was said."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key=kw["api_key"], max_retries=0) as client:
        messages = list(prompt)
        for question in ("Are you sure?", None):
            reply = await client.chat.completions.create(model="policy", messages=messages, **request_kwargs)
            messages.append(reply.choices[0].message.model_dump(exclude_none=True))
            if question:
                messages.append({"role": "user", "content": question})


def settings_of(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = overlay(
        folder,
        folder / case,
        arguments.longest,
        rollout={"num_rollout": arguments.steps, "dump_samples": 0, **(SMALL if arguments.small else {})},
        train={"max_tokens_per_gpu": arguments.tokens, "gradient_checkpointing": False},
        optimizer={"lr": arguments.lr, "lr_warmup_steps": 0, "weight_decay": 0.0},
    )
    tail_of = {"name": "sglang_modes:long_tailed", "median": arguments.median, "sigma": arguments.sigma}
    agent = {"name": "agent", "function": "sglang_modes:asks_twice"}
    [task] = settings["data"]["sets"]
    task |= {"reward": "main_job:even", "generate": agent if case.startswith("agent") else tail_of}
    if case.startswith("agent"):
        task["sampling"]["max_new_tokens"] = arguments.median // 2
    return settings


def run_case(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, the GPUs watched; what became of it."""
    file, log = folder / f"{case}.yaml", out_folder() / f"modes_{case}.log"
    file.write_text(json.dumps(settings_of(case, arguments, folder)))  # JSON is YAML
    words = ["-m", "miles", "train", RECIPE / "config.yaml", file, "--no-report", "--device", arguments.device]
    words += ["--rollout-engine", arguments.engine, *CASES[case], *arguments.rest]
    if arguments.engine == "sglang":
        words += [*THROUGH_MILES.split(), *(GATHER if "fully_async" in CASES[case] else ()), *arguments.flags.split()]
    ended: dict[int, float] = {}

    def note(line: str) -> None:
        if found := re.match(r"step (\d+)/", line):
            ended[int(found[1])] = time.time()

    watch = GpuWatch()
    with watch.watching():
        code, seconds = run_process([sys.executable, *words], log, arguments.limit, note)
    keep_logs(folder / case, f"modes_{case}")
    figures: dict[str, Any] = {"code": code, "seconds": seconds, "gpu_peak_mib": watch.peak_mib()}
    figures |= {"error": f"status {code}", "said": tail(log)} if code else {}
    first, burst = min(arguments.warm, arguments.steps - 2), 1 + ahead(case)
    last = min(max(ended, default=0), arguments.steps - burst)
    last -= max(last - first, 0) % burst
    if first in ended and last > first:
        figures["steps_per_hour"] = 3600 * (last - first) / (ended[last] - ended[first])
        figures["idle"] = watch.idle([(ended[first], ended[last])])
    text = (folder / case / "metrics.jsonl").read_text() if ended else ""
    (out_folder() / f"modes_{case}_metrics.jsonl").write_text(text)
    steps = [step for step in map(json.loads, text.splitlines()) if step["step"]]
    return figures | told(steps, [step for step in steps if first < step["step"] <= last])


def ahead(case: str) -> int:
    """How many batches may be begun before the trainer wants them."""
    words = CASES[case]
    if "fully_async" in words:
        return int(words[words.index("--max-weight-staleness") + 1])
    return int("one_step_off" in words)


def told(steps: list[dict[str, float]], counted: list[dict[str, float]]) -> dict[str, Any]:
    """Of what every step learned, and of what those that count took."""

    def of_each(name: str) -> list[float]:
        return [step[name] for step in counted if step.get(name) is not None]

    def average(name: str) -> float | None:
        found = of_each(name)
        return mean(found) if found else None

    tokens, seconds = sum(of_each("rollout/generated_tokens")), sum(of_each("perf/generate_time"))

    figures: dict[str, Any] = {
        "rewards": [step["rollout/reward"] for step in steps],
        "reward_last": mean(step["rollout/reward"] for step in steps[-LEARNED:]) if steps else None,
        "generated_tokens": average("rollout/generated_tokens"),
        "tok/s": tokens / seconds if seconds else None,
        "staleness": average("rollout/staleness/mean"),
        "abs_diff": average("train/train_rollout_logprob_abs_diff"),
        "longest": max(of_each("perf/step_time"), default=None),
        "failed": max((step["rollout/failed_ratio"] for step in steps), default=None),
    }
    return figures | {phase: average(f"perf/{phase}_time") for phase in PHASES}


def table(book: Book) -> list[list[Any]]:
    names = ["steps_per_hour", *PHASES, "longest", "idle", "generated_tokens", "tok/s", "staleness", "abs_diff"]
    names += ["failed", "reward_last"]
    rows: list[list[Any]] = [["case", "of sync", *names, "peak GiB", ""]]
    base = book.figures.get("sync", {}).get("steps_per_hour")
    for case, figures in book.figures.items():
        if case != "versions":
            speed, peak = figures.get("steps_per_hour"), max(figures.get("gpu_peak_mib") or [0]) / 1024
            ratio = speed / base if speed and base else None
            shown = [figures.get(name) for name in names]
            rows.append([case, ratio, *shown, peak, str(figures.get("error", ""))[:200]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES), default=["sync", "async-2"])
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--flags", default="--sglang-attention-backend triton", help="of SGLang, in one string")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and batches")
    parser.add_argument("--steps", type=int, default=17)
    parser.add_argument("--warm", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--median", type=int, default=256, help="tokens of a response")
    parser.add_argument("--sigma", type=float, default=0.8, help="of its logarithm; 0: all are equally long")
    parser.add_argument("--longest", type=int, default=1536, help="tokens of a response")
    parser.add_argument("--tokens", type=int, default=16_384, help="in a micro-batch")
    parser.add_argument("--lr", type=float, default=3e-6)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a case is killed")
    arguments, arguments.rest = parser.parse_known_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no case is named {', '.join(sorted(unknown))}: {', '.join(CASES)}")
    book = Book(f"modes_{'_'.join(arguments.cases)}")
    with tempfile.TemporaryDirectory(prefix="modes-") as name:
        folder = Path(name)
        device = "cuda" if arguments.device.startswith("cuda") else "cpu"
        make_checkpoint(folder / "model", "tiny" if arguments.small else "0.6B", device, parity=PARITY)
        make_problems(folder)
        for case in arguments.cases:
            book.case(case, lambda case=case: run_case(case, arguments, folder))
    book.show(table(book))
    for case, figures in book.figures.items():
        if rewards := figures.get("rewards"):
            print(f"{case}: reward of each step {' '.join(f'{reward:.3f}' for reward in rewards)}")


if __name__ == "__main__":
    main()
