"""The main job with SGLang as its engine, on GPUs that trainer and servers share: end to end, and where time goes.

    python scripts/gpu/sglang_job.py dense moe torch killed quickstart [--steps 4] [--flags "--sglang-KEY VALUE ..."]
    PYTHONPATH=$PWD/scripts/gpu/stand_in python scripts/gpu/sglang_job.py dense killed --small --device cpu   # no GPU

Cases, each a process of its own with a limit of `--limit` seconds:

    dense        the recipe examples/qwen3-0.6b-grpo (colocate, executor inprocess) at the shape of Qwen3-0.6B with
                 random weights, on made-up problems; the check of every weight sync is on
    moe          the same with a Qwen3-MoE of 1.4 billion parameters, asking for routed experts
    two          `dense` on two GPUs (executor local): two train ranks, a server beside each
    ray          `two` on a Ray cluster of this machine
    external     `dense` on one GPU; the server is one that runs already, on the other, and takes weights from disk
    torch        `dense` with the torch engine, for comparison
    torch-moe    `moe` with it
    killed       `dense`; in the middle of the second rollout its server is killed with SIGKILL
    quickstart   examples/quickstart (a model of 0.6 million parameters learns to add), learned through SGLang and
                 through the torch engine, from the same warm-up, both in bf16

Seconds of phases are the run's own metrics. `idle` is 1 - utilisation.gpu of NVML, which says for up to a second past
whether any kernel ran: good for whole steps, blurred by that for their phases. Differences of log-probabilities are
between engine (as it drew) and trainer (recomputed before it learns), over all trained tokens of a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Book, GpuWatch, descendants, keep_logs, options_of, out_folder, run_process, tail
from main_job import RECIPE, ROOT, make_problems, overlay
from servers import THROUGH_MILES, serving
from shapes import imported, make_checkpoint

import miles
from miles.api import hookimpl, recorded_experts

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("0.6B", ()),
    "moe": ("moe", ("routes",)),
    "two": ("0.6B", ()),
    "ray": ("0.6B", ()),
    "external": ("0.6B", ("external",)),
    "torch": ("0.6B", ("torch",)),
    "torch-moe": ("moe", ("torch", "routes")),
    "killed": ("0.6B", ("kill",)),
}
"""Name -> shape of the model, and what is special."""
TWO = "--actor-num-gpus-per-node 2"
WHERE = {
    "two": TWO,
    "ray": f"{TWO} --executor ray",
    "external": "--executor inprocess --no-colocate --rollout-external --rollout-external-engine-addrs",
}
"""Flags of cases that are not one process; the last wants the server's URL after it."""
SMALL = {"0.6B": "tiny", "moe": "tiny-moe"}
PHASES = ("step", "generate", "rollout", "workers", "train", "move", "sync")
SHARES = {"perf/overhead_share": "overhead_share", "perf/generate_tokens_per_second": "generate_tokens_per_second"}
ENGINE = "rollout/engine/"
SERVER = "sglang.launch_server"
"""In the command line of a server's main process, and of the guard before it, which is not meant."""


class Watch:
    """Lifecycle hooks that note when phases end, time what engines are asked to do, and look at every batch."""

    def __init__(self, kill: bool = False, routes: bool = False):
        self.kill, self.routes = kill, routes
        self.marks: list[tuple[str, float]] = []
        """Phase that ended, `time.time()`."""
        self.calls: dict[str, list[float]] = defaultdict(list)
        """Seconds of each call, by method and what it was called with."""
        self.differences: list[dict[str, float]] = []
        self.batches: list[dict[str, Any]] = []
        self.syncs: list[dict[str, float]] = []
        self.killed: dict[str, Any] = {}
        self.answered = 0

    @hookimpl
    def miles_on_run_start(self, run: Any) -> None:
        for index, engine in enumerate(run.parts.engines):
            for name in ("sleep", "wake", "receive", "restart"):
                if hasattr(engine, name):
                    setattr(engine, name, self._timed(getattr(engine, name), f"{name}" + f"#{index}" * bool(index)))
        run.trainer._forward = self._compared(run.trainer._forward)
        engine = run.parts.engines[0]
        if self.kill:
            engine.generate = self._killing(run, engine.generate)
        if self.routes:
            for task in run.producer.tasks.values():
                task.context = replace(task.context, routed_experts=True)

    def _timed(self, function: Callable, name: str) -> Callable:
        async def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return await function(*args)
            finally:
                parts = "+".join(sorted(args[0])) if args and isinstance(args[0], frozenset) else ""
                self.calls[f"{name} {parts}".strip()].append(time.perf_counter() - start)

        return timed

    def _compared(self, forward: Callable) -> Callable:
        async def compared(model: str, table: Any, *want: Any) -> Any:
            rows = await forward(model, table, *want)
            if model == "actor" and not want and table.has("rollout_log_probs"):
                columns = (
                    np.concatenate([np.asarray(c) for c in table.columns[n]]) for n in ("rollout_log_probs", "mask")
                )
                said, mask = columns
                gaps = np.abs(np.concatenate(rows) - said)[mask > 0]
                large = {f"p{p}": float(np.percentile(gaps, p)) for p in (50, 99)}
                self.differences.append({"mean": float(gaps.mean()), "max": float(gaps.max()), **large})
            return rows

        return compared

    def _killing(self, run: Any, generate: Callable) -> Callable:
        async def killing(request: Any) -> Any:
            result = await generate(request)
            rollout = run.config.rollout
            self.answered += run.step == 1
            if not self.killed and self.answered >= rollout.batch_size * rollout.n_samples_per_prompt // 4:
                self.killed = kill_server()
                self.killed |= {"answered_before": self.answered, "step": run.step}
            return result

        return killing

    @hookimpl
    def miles_on_rollout_end(self, run: Any, step: int, groups: Any, metrics: Any) -> None:
        self.marks.append(("rollout", time.time()))
        samples = [sample for group in groups for sample in group.samples]
        found: dict[str, Any] = {
            "samples": len(samples),
            "distinct": len({sample.id for sample in samples}),
            "new_tokens": sum(sample.response_length for sample in samples),
            "versions": sorted({int(v) for s in samples for v in s.columns["weight_version"][s.prompt_length :]}),
            "failed_ratio": metrics["rollout/failed_ratio"],
            "engine": {k.removeprefix(ENGINE): v for k, v in metrics.items() if k.startswith(ENGINE) and v},
        }
        if self.routes:
            found |= coverage(samples)
        self.batches.append(found)

    @hookimpl
    def miles_on_train_step_end(self, run: Any, step: int, metrics: Any) -> None:
        self.marks.append(("train", time.time()))

    @hookimpl
    def miles_on_weight_sync_end(self, run: Any, version: int, metrics: Any) -> None:
        self.marks.append(("sync", time.time()))
        self.syncs.append(dict(metrics))

    def windows(self, phase: str) -> list[tuple[float, float]]:
        """From the end of the phase before to the end of this one, the first step left out."""
        spans = [(before[1], after[1]) for before, after in pairwise(self.marks) if after[0] == phase]
        return spans[1:]


def kill_server() -> dict[str, Any]:
    """SIGKILL to the main process of one server that this process, or a worker of it, has started."""
    mine = descendants(os.getpid())
    found = [(pid, words) for pid, words in sorted(mine.items()) if SERVER in words and "guard.py" not in words]
    if not found:
        return {"error": f"no server among {sorted(mine.values())}"}
    os.kill(found[0][0], signal.SIGKILL)
    return {"pid": found[0][0], "command": found[0][1][:120], "time": time.time()}


def coverage(samples: Sequence[Any]) -> dict[str, Any]:
    """Of samples that have their expert choices, and how much of these was recorded."""
    columns = [s.columns["rollout_routed_experts"] for s in samples if "rollout_routed_experts" in s.columns]
    rows = sum(len(column) for column in columns)
    recorded = [column[recorded_experts(column)] for column in columns]
    return {
        "samples_with_experts": len(columns),
        "rows_recorded": sum(len(column) for column in recorded) / max(rows, 1),
        "distinct_experts": len(np.unique(recorded[0])) if recorded else 0,
        "bytes_a_token": sum(c.nbytes for c in columns) / max(rows, 1),
    }


# ---------------------------------------------------------------------------------------------------- a case: the child


def child(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one job in this process; everything that is known of it."""
    shape, special = shape_of(case, arguments), CASES[case][1]
    if "external" not in special:
        make_model(shape, arguments, folder)
    make_problems(folder)
    settings = overlay(
        folder,
        folder / case,
        arguments.new_tokens,
        rollout={"num_rollout": arguments.steps, "dump_samples": None, **SMALL_BATCH[arguments.small]},
        weight_sync={"verify": "always"},
        train={"max_tokens_per_gpu": arguments.tokens, "gradient_checkpointing": False},
    )
    settings["data"]["sets"][0]["reward"] = "main_job:even"
    words = ["--device", arguments.device, "--max-restarts", "0", "--no-report"]
    words += WHERE.get(case, "--executor inprocess").split()
    if "external" in special:
        words.append(arguments.server)
    elif "torch" in special:
        words += ["--rollout-engine", "torch"]
    else:
        words += ["--rollout-engine", arguments.engine, *server_flags(arguments)]
        if "routes" in special and arguments.engine == "sglang":
            words.append("--sglang-enable-return-routed-experts")
    watch = Watch(kill="kill" in special, routes="routes" in special)
    start = time.perf_counter()
    figures = trained(settings, words, watch, folder / case)
    return {
        "shape": shape,
        "job_seconds": time.perf_counter() - start,
        **figures,
        "calls": watch.calls,
        "differences": watch.differences,
        "batches": watch.batches,
        "syncs": watch.syncs,
        "killed": watch.killed,
        "windows": {phase: watch.windows(phase) for phase in ("rollout", "train", "sync")},
    }


def shape_of(case: str, arguments: argparse.Namespace) -> str:
    shape, _ = CASES[case]
    return SMALL[shape] if arguments.small else shape


def make_model(shape: str, arguments: argparse.Namespace, folder: Path) -> None:
    make_checkpoint(folder / "model", shape, "cuda" if arguments.device.startswith("cuda") else "cpu")


def server_flags(arguments: argparse.Namespace) -> list[str]:
    return f"{THROUGH_MILES} {arguments.flags}".split() if arguments.engine == "sglang" else []


SMALL_BATCH: dict[bool, dict[str, Any]] = {False: {}, True: {"batch_size": 4, "n_samples_per_prompt": 4}}


def trained(settings: dict[str, Any], words: Sequence[str], watch: Watch, run_dir: Path) -> dict[str, Any]:
    """Train; metrics of every step."""
    from miles.config.load import resolve
    from miles.jobs import run_training
    from miles.plugins import load_plugins

    plugins = load_plugins()
    plugins.manager.register(watch)  # of this process alone: workers would look for a plugin of its name
    resolved = resolve([RECIPE / "config.yaml", settings], words, plugins)
    error = None
    try:
        run_training(resolved)
    except miles.errors.MilesError as failure:
        error = f"{type(failure).__name__}: {failure}"
        traceback.print_exc()
    return {"steps": steps_of(run_dir), **({"error": error} if error else {})}


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """What the table shows of each step that a run has finished."""
    file = run_dir / "metrics.jsonl"
    steps = []
    for line in file.read_text().splitlines() if file.exists() else ():
        metrics = json.loads(line)
        row = {phase: metrics.get(f"perf/{phase}_time") for phase in PHASES}
        row |= {short: metrics.get(name) for name, short in SHARES.items()}
        row |= {name: metrics.get(f"rollout/{name}") for name in ("reward", "generated_tokens", "cached_ratio")}
        row["abs_diff"] = metrics.get("train/train_rollout_logprob_abs_diff")
        row["probe"] = metrics.get("weight_sync/logprob_abs_diff")
        row["bytes"] = metrics.get("weight_sync/bytes")
        steps.append(row)
    return steps


# --------------------------------------------------------------------------------------------------------- the parent


def run_case(case: str, arguments: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """A case in a process of its own, the GPUs watched."""
    with tempfile.TemporaryDirectory(prefix=f"{case}-") as name:
        folder, log = Path(name), out_folder() / f"job_{case}.log"
        watch = GpuWatch()
        with watch.watching():
            words = [sys.executable, __file__, case, "--child", folder, *rest]
            if "external" in CASES[case][1]:
                make_model(shape_of(case, arguments), arguments, folder)
                code, seconds = asyncio.run(beside_server(words, log, arguments, folder))
            else:
                code, seconds = run_process(words, log, arguments.limit)
        keep_logs(folder / case, f"job_{case}")
        figures: dict[str, Any] = {"code": code, "seconds": seconds, "gpu_peak_mib": watch.peak_mib()}
        found = folder / "figures.json"
        if not found.exists():
            return {**figures, "error": f"status {code}", "said": tail(log), "steps": steps_of(folder / case)}
        figures |= json.loads(found.read_text())
        windows = figures.pop("windows")
        figures["idle"] = {phase: watch.idle(spans) for phase, spans in windows.items()}
        figures["idle"]["step"] = watch.idle([span for spans in windows.values() for span in spans])
        figures["left_behind"] = [words[:80] for words in leftovers(folder)]
        if "error" in figures:
            figures["said"] = tail(log)
        return figures


async def beside_server(words: list[Any], log: Path, arguments: argparse.Namespace, folder: Path) -> tuple[int, float]:
    """`run_process`, and a server that runs before and after it, on the second GPU."""
    flags = ["--base-gpu-id", "1"] if arguments.device.startswith("cuda") else []
    flags += arguments.flags.replace("--sglang-", "--").split()
    async with serving("sglang", folder / "model", out_folder() / "job_external_server.log", flags) as url:
        return await asyncio.to_thread(run_process, [*words, "--server", url], log, arguments.limit)


def leftovers(folder: Path) -> list[str]:
    """Processes whose command line names the case's folder: servers that nobody ended."""
    time.sleep(1)
    return [words for words in descendants(1).values() if str(folder) in words]


def prepare_heads(data: Path, seed: int, head_dim: int) -> None:
    """The quickstart's data, its model with heads of another width."""
    from transformers import AutoConfig, AutoModelForCausalLM

    imported(ROOT / "examples/quickstart/prepare.py").prepare(data, seed)
    config = AutoConfig.from_pretrained(data / "model")
    config.head_dim = head_dim
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(data / "model")


def quickstart(arguments: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """Data and warm-up once; then the same learning with each engine."""
    data = ROOT / f"runs/quickstart/seed-{arguments.seed}/data"
    if arguments.head_dim and not data.exists():
        prepare_heads(data, arguments.seed, arguments.head_dim)
    common = "--train-dtype bf16 --colocate --executor inprocess"
    if arguments.small:
        common += " --num-rollout 6 --eval-interval 6"
    figures: dict[str, Any] = {}
    for engine in dict.fromkeys((arguments.engine, "torch")):
        flags = " ".join(server_flags(arguments)) if engine != "torch" else ""
        words = f"--run {engine}-bf16 --rollout-engine {engine} --device {arguments.device} {common} {flags}"
        log = out_folder() / f"job_quickstart_{engine}.log"
        script = ["bash", ROOT / "examples/quickstart/run.sh", "--seed", str(arguments.seed), *words.split()]
        code, seconds = run_process(script, log, arguments.limit)
        run_dir = ROOT / f"runs/quickstart/seed-{arguments.seed}/{engine}-bf16"
        if code:
            figures[engine] = {"error": f"status {code}", "said": tail(log)}
            continue
        summary = json.loads((run_dir / "summary.json").read_text())
        steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        learned = [s["rollout/reward"] for s in steps if "rollout/reward" in s]
        figures[engine] = {
            "seconds_with_warm_up": seconds,
            "seconds": summary["seconds"],
            "reward_first": learned[0],
            "reward_last": learned[-1],
            "step_seconds": float(np.median([s["perf/step_time"] for s in steps[1:]])),
            "abs_diff": float(np.mean([s.get("train/train_rollout_logprob_abs_diff", 0.0) for s in steps[1:]])),
            "accuracy": {n: [e["first"]["accuracy"], e["last"]["accuracy"]] for n, e in summary["evaluation"].items()},
        }
    return figures


def table(book: Book) -> list[list[Any]]:
    """A row a step of every case."""
    rows: list[list[Any]] = [["case", "step", *PHASES, "tok/s", "diff mean", "max", "probe", "idle", "peak GiB", ""]]
    for case, figures in book.figures.items():
        if case in ("versions", "quickstart"):
            continue
        idle, peak = figures.get("idle", {}), figures.get("gpu_peak_mib") or [0]
        for index, step in enumerate(figures.get("steps", [])):
            gaps = figures["differences"][index - 1] if 0 < index <= len(figures.get("differences", [])) else {}
            cells = [step[phase] for phase in PHASES]
            cells += [step["generate_tokens_per_second"], gaps.get("mean"), gaps.get("max"), step["probe"]]
            rows.append([case, index, *cells, idle.get("step"), max(peak) / 1024, ""])
        if "error" in figures:
            rows.append([case, *[None] * (len(rows[0]) - 2), str(figures["error"])[:200]])
    return rows


def more(book: Book) -> None:
    """What has no column in the table."""
    for case, figures in book.figures.items():
        if case == "versions":
            continue
        if case == "quickstart":
            print(f"{case}: {json.dumps({k: v for k, v in figures.items() if k != 'case_seconds'})}"[:1500])
            continue
        calls = {name: [round(s, 4) for s in seconds] for name, seconds in figures.get("calls", {}).items()}
        idle = json.dumps(figures.get("idle"))
        print(f"{case}: {figures.get('seconds', 0):.0f} s; calls {json.dumps(calls)}; idle {idle}")
        for name in ("killed", "left_behind"):
            if figures.get(name):
                print(f"    {name}: {json.dumps(figures[name])[:400]}")
        print(f"    batches: {json.dumps(figures.get('batches'))[:600]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE", choices=[*CASES, "quickstart"])
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--flags", default="--sglang-attention-backend triton", help="of SGLang, in one string")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and batches")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384, help="in a micro-batch")
    parser.add_argument("--seed", type=int, default=1, help="of the quickstart")
    parser.add_argument("--head-dim", type=int, help="of the quickstart's model, where 32 is too few for a kernel")
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a case is killed")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--server", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        figures = child(arguments.cases[0], arguments, arguments.child)
        (arguments.child / "figures.json").write_text(json.dumps(figures))
        return
    rest = options_of(sys.argv[1:])
    book = Book(f"job_{'_'.join(arguments.cases)}")
    measures: Mapping[str, Callable[..., dict[str, Any]]] = {"quickstart": quickstart}
    for case in arguments.cases:
        book.case(
            case,
            lambda case=case: measures[case](arguments, rest) if case in measures else run_case(case, arguments, rest),
        )
    book.show(table(book))
    more(book)


if __name__ == "__main__":
    main()
