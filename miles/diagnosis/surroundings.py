"""The hub, and environment variables that change what a run does."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from miles.diagnosis.finding import Finding

GIB = 1 << 30
ENDPOINT = "https://huggingface.co"
SECONDS = 4

VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "which GPUs torch sees",
    "PYTORCH_ALLOC_CONF": "how torch allocates memory",
    "PYTORCH_CUDA_ALLOC_CONF": "how torch allocates GPU memory",
    "CUBLAS_WORKSPACE_CONFIG": "whether cuBLAS repeats itself; --deterministic-mode sets it",
    "NVIDIA_TF32_OVERRIDE": "TF32 in place of fp32, for everything",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: slow",
    "OMP_NUM_THREADS": "threads of torch; --num-threads goes before it",
    "MKL_NUM_THREADS": "threads of MKL",
    "NCCL_P2P_DISABLE": "GPUs exchange data through the host: slow",
    "NCCL_SOCKET_IFNAME": "the network that NCCL uses",
    "NCCL_DEBUG": "how much NCCL says",
    "TORCH_LOGS": "how much torch says",
    "TOKENIZERS_PARALLELISM": "threads of tokenizers",
    "WANDB_MODE": "whether wandb sends anything",
    "PYTHONPATH": "what is imported before what is installed",
    "PYTHONOPTIMIZE": "assertions are left out",
    "PYTHONHASHSEED": "the order of sets",
    "LD_PRELOAD": "libraries before all others",
    "LD_LIBRARY_PATH": "libraries before those of torch: a CUDA of another version may be found there",
    "HTTPS_PROXY": "the way to the hub",
    "https_proxy": "the way to the hub",
}
"""What they change."""


def environment() -> Iterator[Finding]:
    """Those of `VARIABLES` that are set."""
    for name, what in VARIABLES.items():
        value = os.environ.get(name)
        if value:
            shown = value if len(value) <= 60 else f"{value[:57]}..."
            yield Finding(name, "info", f"{shown}   ({what})", facts={"value": value})


def hub(online: bool) -> Iterator[Finding]:
    """Where checkpoints are kept, whether the hub may be asked, and, if wanted, whether it answers."""
    cache = cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    found = f"{cache}{'' if there == cache else ' (not there yet)'}: {usage.free / GIB:.1f} GiB free"
    facts = {"path": str(cache), "free_bytes": usage.free, "exists": there == cache}
    if usage.free < 5 * GIB:
        yield Finding("cache", "warn", found, "export HF_HOME=/a/larger/disk", facts=facts)
    else:
        yield Finding("cache", "ok", found, facts=facts)
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _on(os.environ.get(name))]
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HF_TOKEN_PATH")) or (cache.parent / "token").exists()
    said = f"{offline[0]} is set: only what is in the cache" if offline else "asked when a hub name is given"
    said += f"; {'a token is set' if token else 'no token (needed for private and gated repositories)'}"
    yield Finding("access", "info", said, facts={"offline": bool(offline), "token": token})
    if online:
        yield _reached(os.environ.get("HF_ENDPOINT") or ENDPOINT)


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    named = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(named).expanduser() if named else Path(home).expanduser() / "hub"


def _on(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _reached(endpoint: str) -> Finding:
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "miles doctor"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return Finding("connection", "ok", f"{endpoint} answers ({answer.status})", facts={"reached": True})
    except urllib.error.HTTPError as error:  # an answer, if not a friendly one
        return Finding("connection", "ok", f"{endpoint} answers ({error.code})", facts={"reached": True})
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "a proxy (HTTPS_PROXY), a mirror (HF_ENDPOINT), or local folders: --hf-checkpoint FOLDER"
        return Finding(
            "connection", "warn", f"{endpoint} cannot be reached: {reason}", remedy, facts={"reached": False}
        )
