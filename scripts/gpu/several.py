"""The main job over several GPUs, at the shape of Qwen3-0.6B with random weights: what each step costs.

    python scripts/gpu/several.py [CASE ...] [--steps 3] [--device cpu --shape hidden_size=64 ...]

Cases, each a `miles train` of the recipe examples/qwen3-0.6b-grpo on made-up problems:

    one          one process, trainer and engine take turns on one GPU
    colocated    two train ranks, each with an engine beside it, taking turns
    ray          the same on a Ray cluster
    apart        one train rank and one engine, a GPU each; weights by broadcast (NCCL)
    delta        the same, weights by what changed on disk
    context      `colocated`, the two ranks sharing the tokens of each sample (context parallelism)
    cramped      `colocated`, one step without the compiler, rank 1 capped at 3/4 of the memory that its first
                 micro-batch took
    cramped-compiled     the same with it; why layers are compiled anew is in the workers' logs
    exact-1, exact-2     one process and two ranks in fp32 with --reproducible-ranks 2, to be compared to the bit
    killed       `colocated`, a rank killed with SIGKILL in the second step, and one restart

Prints, for every case, seconds of the last step's phases, what a weight sync cost how far engine and trainer differ,
and the least and most memory that each GPU held while the run was at it, in the order of their indices.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cases import keep_logs
from main_job import RECIPE, make_inputs, overlay

from miles.builtins.losses import ppo_clip
from miles.builtins.options import PpoClipOptions
from miles.report.compare import compare

PHASES = ("step", "generate", "workers", "move", "sync", "rollout", "train")
PEAKS: list[int] = []
CALLS: list[float] = []
SHOWN = (
    "rollout/reward",
    "train/grad_norm",
    "train/train_rollout_logprob_abs_diff",
    "perf/generate_tokens_per_second",
)
TWO = ("--actor-num-gpus-per-node", "2", "--colocate")
APART = ("--rollout-num-gpus", "1", "--no-colocate")
EXACT = ("--reproducible-ranks", "2", "--train-dtype", "fp32", "--dump-samples", "256", "--save-hf", "hf")
ROOMY = ("--no-gradient-checkpointing", "--max-tokens-per-gpu", "16384")  # what is computed is most of what is held
CRAMPED = (*TWO, "--policy-loss", "several:cramped", *ROOMY, "--num-rollout", "1")
TRACED = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_LOGS": "recompiles"}
"""How many collectives torch remembers, for `tell_collectives`; and what it says by itself."""
CASES: dict[str, tuple[str, ...]] = {
    "one": ("--executor", "inprocess"),
    "colocated": TWO,
    "ray": (*TWO, "--executor", "ray"),
    "apart": APART,
    "delta": (*APART, "--weight-sync", "disk", "--update-weight-mode", "delta"),
    "context": (*TWO, "--context-parallel-size", "2"),
    "cramped": (*CRAMPED, "--no-compile", "--worker-timeout", "100"),
    "cramped-compiled": (*CRAMPED, "--worker-timeout", "400"),
    "exact-1": ("--executor", "inprocess", *EXACT),
    "exact-2": (*TWO, *EXACT),
    "killed": (*TWO, "--max-restarts", "1", "--save-interval", "1"),
}


def cramped(inputs: Any) -> Any:
    """The recipe's policy loss; at its second call rank 1 gets three quarters of what the first micro-batch took.
    Without a GPU memory runs out in that call. Where each rank stands is in its log, from a minute on."""
    CALLS.append(time.perf_counter())
    if len(CALLS) == 1:
        faulthandler.dump_traceback_later(60, repeat=True)
        tell = threading.Timer(70, tell_collectives)
        tell.daemon = True
        tell.start()
    if not torch.cuda.is_available() and os.environ.get("RANK") == "1" and len(CALLS) == 2:
        raise torch.OutOfMemoryError("made up")
    if torch.cuda.is_available() and os.environ.get("RANK") == "1" and len(PEAKS) < 2:
        PEAKS.append(torch.cuda.max_memory_reserved())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if len(PEAKS) == 2:
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(0.75 * PEAKS[1] / whole)
            held = torch.cuda.memory_allocated()
            Path("capped.json").write_text(json.dumps({"first_micro_batch": PEAKS[1], "held_now": held}))
    return ppo_clip(inputs, options=PpoClipOptions(eps=0.2, eps_high=0.28))


def tell_collectives() -> None:
    """In the worker's log: the last of what this rank has asked NCCL for, and what of it is done."""
    now = time.perf_counter()
    print(f"calls of the loss, seconds ago: {[round(now - call, 1) for call in CALLS]}", flush=True)
    if torch.cuda.is_available():
        told = torch._C._distributed_c10d._dump_nccl_trace_json(includeCollectives=True, onlyActive=False)
        for entry in json.loads(told).get("entries", [])[-60:]:
            shown = ("collective_seq_id", "profiling_name", "input_sizes", "state")
            print(*(entry.get(name) for name in shown), flush=True)


class Memory:
    """Watches what each GPU holds, in MiB."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._over.wait(0.25):
            with suppress(OSError):
                said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
                self.seen.append([int(number) for number in said])

    def most(self) -> list[int]:
        return [max(column) for column in zip(*self.seen, strict=True)]


def run(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One case, and what came of it."""
    run_dir = folder / case
    settings = overlay(
        folder,
        run_dir,
        arguments.new_tokens,
        rollout={"num_rollout": arguments.steps},
        weight_sync={"verify": "always"},
    )
    settings["data"]["sets"][0]["reward"] = "main_job:even"
    file = folder / f"{case}.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    words = [sys.executable, "-m", "miles", "train", str(RECIPE / "config.yaml"), str(file)]
    words += ["--no-report", "--device", arguments.device, *CASES[case], *arguments.flags]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    with Memory() as memory:
        process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env={**os.environ, **TRACED, "PYTHONPATH": paths}
        )
        assert process.stderr is not None
        limit = threading.Timer(arguments.limit, process.kill)
        limit.start()
        said = []
        for line in process.stderr:
            said.append(f"{time.perf_counter() - start:6.1f}  {line}")
            (Path(os.environ.get("OUT", folder)) / f"{case}.log").write_text("".join(said))
            if case == "killed" and line.startswith("step 1/") and not any("restart" in earlier for earlier in said):
                os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
        code = process.wait()
        limit.cancel()
    figures: dict[str, Any] = {"code": code, "seconds": time.perf_counter() - start, "gpu_mib": memory.most()}
    time.sleep(1)  # the kernel takes its time to end the workers of a driver that was killed
    figures["left_behind"] = workers_of(process.pid)
    keep_logs(run_dir, case)
    if (capped := Path("capped.json")).exists():
        figures["capped"] = json.loads(capped.read_text())
        capped.unlink()
    if code:
        return figures | {"said": "".join(said[-40:])}
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = metrics[-1]
    figures["phases"] = {phase: last.get(f"perf/{phase}_time") for phase in PHASES}
    figures |= {name: last.get(name) for name in SHOWN}
    figures["oom_retries"] = [line.get("train/oom_retries") for line in metrics]
    figures["syncs"] = [{k: v for k, v in line.items() if k.startswith("weight_sync/")} for line in metrics]
    figures["restarts"] = json.loads((run_dir / "summary.json").read_text())["restarts"]
    return figures


def workers_of(driver: int) -> list[int]:
    """Worker processes that a driver has started and that are there."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
            if "miles.workers.serve" in words and str(driver) in words:
                found.append(int(entry))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--limit", type=float, default=200, help="seconds after which a case is killed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="*", default=[], metavar="KEY=VALUE")
    arguments, arguments_flags = parser.parse_known_args()
    arguments.flags = arguments_flags
    shape = {key: int(value) for key, value in (pair.split("=") for pair in arguments.shape)}
    every = {}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), shape, arguments.device)
        for case in arguments.cases or list(CASES):
            every[case] = run(case, arguments, Path(name))
            if case == "exact-2" and "exact-1" in every:
                found = compare(Path(name) / "exact-1", Path(name) / "exact-2")
                every[case] |= {"first_differing_token": str(found.first_token), "weights_apart": found.weights}
            print(json.dumps({case: every[case]}), flush=True)
            if out := os.environ.get("OUT"):
                (Path(out) / "several.json").write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
