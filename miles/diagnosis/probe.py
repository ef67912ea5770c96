"""What can only be found out by importing torch and everything else, in a process of its own.

`python -m miles.diagnosis.probe '["blocked plugin", ...]'` prints one line of JSON for each stage that it finishes,
and names each stage before it begins: whoever reads this knows where it was when it died. `gather` runs and reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

MARK = "MILES-PROBE "
SECONDS = 60
SIZE = 512
"""Rows of the matrices of the compute check."""
COARSE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest error of a product, relative to its largest entry, that is put down to the number format. (TF32 is the
loosest of what is called float32 on a GPU, and stays below; torch does not use it unless it is told to.)"""

Facts = dict[str, dict[str, Any]]
"""Stage -> what it found, or `{"error": ...}`."""


def gather(blocked: Sequence[str] = (), seconds: float = SECONDS) -> Facts:
    """Run the stages in another process. A stage that died, hung or was never reached has an `error`."""
    command = [sys.executable, "-m", __name__, json.dumps(list(blocked))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace",
                              timeout=seconds, check=False)  # fmt: skip
        out, end = done.stdout, _end(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as late:
        out, end = _text(late.stdout), f"hung: no answer within {seconds:g} seconds"
    lines = [json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)]
    facts: Facts = {line["stage"]: line["facts"] for line in lines if "facts" in line}
    begun = [line["stage"] for line in lines if "facts" not in line]
    for stage in STAGES:
        if stage not in facts:
            reason = end if stage in begun or not begun else f"not reached: {begun[-1]} {end}"
            facts[stage] = {"error": reason}
    return facts


def _end(code: int, complaint: str) -> str:
    if code < 0:
        from signal import Signals

        return f"ended the process with {Signals(-code).name}"
    last = complaint.strip().splitlines()[-1:] or ["no message"]
    return f"ended the process with exit code {code}: {last[0]}"


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


# -------------------------------------------------------------------------------------------------- in that process


def torch_facts() -> dict[str, Any]:
    """Its build, and the devices that it sees."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "hip_build": getattr(torch.version, "hip", None),
        "threads": torch.get_num_threads(),
        "cuda_available": torch.cuda.is_available(),
        "mps_available": torch.backends.mps.is_available(),
        "devices": [],
    }
    if facts["cuda_build"] and not facts["cuda_available"]:
        try:
            torch.cuda.init()
        except Exception as error:
            facts["cuda_problem"] = str(error).strip().splitlines()[0]
    for index in range(torch.cuda.device_count() if facts["cuda_available"] else 0):
        free, total = torch.cuda.mem_get_info(index)
        facts["devices"].append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": list(torch.cuda.get_device_capability(index)),
                "free_bytes": free,
                "total_bytes": total,
            }
        )
    if facts["devices"]:
        facts["nccl"] = list(torch.cuda.nccl.version())
    return facts


def transformers_facts() -> dict[str, Any]:
    import transformers

    return {"version": transformers.__version__}


def compute_facts() -> dict[str, Any]:
    """A product of two matrices on each device and in each number format, against the same in float64."""
    import torch

    left, right = (torch.linspace(-1, 1, SIZE * SIZE, dtype=torch.float64).reshape(SIZE, SIZE) ** n for n in (1, 3))
    exact = left @ right.T
    products = []
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        for name in COARSE:
            products.append({"device": device, "dtype": name, **_product(left, right, exact, device, name)})
    return {"products": products, "compilers": _compilers()}


def _product(left: Any, right: Any, exact: Any, device: str, name: str) -> dict[str, Any]:
    import torch

    try:
        a, b = (m.to(device, getattr(torch, name)) for m in (left, right.T))
        (a @ b).sum().item()  # the first call sets the library up
        started = time.perf_counter()
        product = a @ b
        product.sum().item()
        seconds = time.perf_counter() - started
        off = float((product.double().cpu() - exact).abs().max() / exact.abs().max())
        return {"milliseconds": round(1000 * seconds, 3), "relative_error": off}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def _compilers() -> dict[str, str | None]:
    """What torch.compile calls: a C++ compiler for the CPU; Triton and a C compiler for a GPU."""
    import importlib.util

    triton = importlib.util.find_spec("triton")
    return {
        "c++": shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++"),
        "c": shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang"),
        "triton": triton.origin if triton else None,
    }


def component_facts(blocked: Sequence[str]) -> dict[str, Any]:
    """Every registered component, its target imported."""
    from miles.diagnosis.components import examined
    from miles.plugins import load_plugins

    plugins = load_plugins(block=blocked, strict=False)
    return {"components": [{**asdict(one), "title": one.title} for one in examined(plugins)]}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": torch_facts,
    "compute": compute_facts,
    "transformers": transformers_facts,
    "components": component_facts,
}


def main(blocked: Sequence[str]) -> None:
    for stage, find in STAGES.items():
        print(MARK + json.dumps({"stage": stage}), flush=True)
        try:
            facts = find(blocked) if stage == "components" else find()
        except BaseException as error:  # a broken library may raise anything, SystemExit included
            reason = str(error).strip().splitlines() or [""]
            facts = {"error": f"{type(error).__name__}: {reason[0]}"}
        print(MARK + json.dumps({"stage": stage, "facts": facts}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
