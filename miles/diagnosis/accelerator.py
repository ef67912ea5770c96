"""GPUs: what the driver sees, what torch sees, and whether both compute right."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from miles.diagnosis.finding import GPU, TRAINING, Finding, Job
from miles.diagnosis.probe import COARSE, Facts

GIB = 1 << 30
CUDA_BUILD = "pip uninstall torch, then pip install 'torch>=2.11,<2.14': what PyPI has for Linux is built with CUDA"


@dataclass(frozen=True)
class Card:
    """A line of nvidia-smi."""

    name: str
    total_mib: str
    free_mib: str
    driver: str
    capability: str


def cards() -> list[Card]:
    """The GPUs that the driver sees; none when it is not there or does not answer."""
    query = "name,memory.total,memory.free,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [Card(*row) for row in rows if len(row) == 5] if done.returncode == 0 else []


def devices(facts: Facts, seen: list[Card]) -> Iterator[Finding]:
    """Torch's build and its devices, against the driver's."""
    torch = facts["torch"]
    if "error" in torch:
        remedy = "pip install --force-reinstall 'torch>=2.11,<2.14'"
        yield Finding("torch", "fault", f"cannot be imported: {torch['error']}", remedy, TRAINING, torch)
        return
    build = f"CUDA {torch['cuda_build']}" if torch["cuda_build"] else "ROCm" if torch["hip_build"] else "the CPU alone"
    yield Finding("torch", "ok", f"{torch['version']}, built for {build}; {torch['threads']} threads", facts=torch)
    for index, device in enumerate(torch["devices"]):
        yield _device(index, device, seen)
    if torch["devices"]:
        yield Finding("nccl", "ok", ".".join(map(str, torch["nccl"])))
    else:
        yield _without_gpu(torch, seen)
    if torch["mps_available"]:
        yield Finding("mps", "info", "an Apple GPU is there; miles has not been tried on it", "--device cpu")


def _device(index: int, device: dict[str, Any], seen: list[Card]) -> Finding:
    capability = ".".join(map(str, device["capability"]))
    free, total = device["free_bytes"], device["total_bytes"]
    driver = f", driver {seen[0].driver}" if seen else ""
    found = f"{device['name']}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {capability}{driver}"
    if device["capability"][0] < 8:
        return Finding(f"cuda:{index}", "warn", found, "it has no bf16: --train-dtype fp32", facts=device)
    if free < total / 2:
        return Finding(
            f"cuda:{index}", "warn", found, "somebody else uses it: nvidia-smi names the process", facts=device
        )
    return Finding(f"cuda:{index}", "ok", found, facts=device)


def _without_gpu(torch: dict[str, Any], seen: list[Card]) -> Finding:
    names = ", ".join(sorted({card.name for card in seen}))
    if seen and not torch["cuda_build"]:
        found = f"nvidia-smi sees {len(seen)} ({names}), but torch {torch['version']} is built for the CPU alone"
        return Finding("gpu", "fault", found, CUDA_BUILD, GPU, {"cards": len(seen)})
    if seen:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else torch.get("cuda_problem", "no reason given")
        found = f"nvidia-smi sees {len(seen)} ({names}, driver {seen[0].driver}), torch sees none: {why}"
        remedy = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else f"a driver for CUDA {torch['cuda_build']}"
        return Finding("gpu", "fault", found, remedy, GPU, {"cards": len(seen)})
    return Finding("gpu", "info", "none found, neither by nvidia-smi nor by torch", "", GPU, {"cards": 0})


def compute(facts: Facts) -> Iterator[Finding]:
    """A small matrix product on each device in fp32 and bf16, and what torch.compile would call."""
    found = facts["compute"]
    if "error" in found:
        if "error" not in facts["torch"]:
            yield Finding("products", "fault", found["error"], "torch cannot compute here: reinstall it", TRAINING)
        return
    for product in found["products"]:
        yield _product(product)
    compilers = found["compilers"]
    on_gpu = any(product["device"] != "cpu" for product in found["products"])
    needed = ("triton", "c") if on_gpu else ("c++",)
    absent = [name for name in needed if not compilers[name]]
    if absent:
        remedy = "your system's package g++; only --attention flex compiles, and only on a GPU"
        yield Finding("torch.compile", "info", f"no {' and no '.join(absent)}", remedy, facts=compilers)
    else:
        yield Finding("torch.compile", "ok", ", ".join(str(compilers[name]) for name in needed), facts=compilers)


def _product(product: dict[str, Any]) -> Finding:
    device, dtype = product["device"], product["dtype"]
    name = f"{device} {dtype}"
    stops: tuple[Job, ...] = GPU if device != "cpu" else TRAINING if dtype == "float32" else ()
    if "error" in product:
        remedy = "update the driver, or torch" if device != "cpu" else f"do without {dtype} on this machine"
        return Finding(name, "fault", product["error"], remedy, stops, product)
    found = f"512 x 512 product in {product['milliseconds']:.2f} ms, off by {product['relative_error']:.0e}"
    if product["relative_error"] > COARSE[dtype]:
        return Finding(
            name, "fault", f"{found}: wrong", "a broken device or library: try another machine", stops, product
        )
    return Finding(name, "ok", found, facts=product)
