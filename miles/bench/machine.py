"""What the machine is, how busy it is, and how much memory the process takes."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles.bench.measure import Circumstances

MIB = 2**20
_PRESSURE, _CPUINFO = Path("/proc/pressure/cpu"), Path("/proc/cpuinfo")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What `clear_refs` takes to forget the peak (proc(5))."""


def machine(device: str) -> dict[str, Any]:
    """CPU, cores that this process may use, threads of torch, and the GPU where one is used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _cpu_model() -> str:
    if _CPUINFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


@dataclass
class Watch:
    """Notes the circumstances of one round: `watch = Watch.start(device)` ... `watch.stop(circumstances)`."""

    device: str
    clock: float
    waited: float | None
    held: float | None

    @classmethod
    def start(cls, device: str) -> Watch:
        held = _reset_memory(device)
        return cls(device, time.perf_counter(), _seconds_waited(), held)

    def stop(self, circumstances: Circumstances) -> None:
        seconds, waited = time.perf_counter() - self.clock, _seconds_waited()
        circumstances.seconds.append(seconds)
        if self.waited is not None and waited is not None:
            circumstances.contention.append((waited - self.waited) / seconds)
        peak = _peak_memory(self.device)
        if peak is not None and self.held is not None:
            circumstances.peak_mib.append(peak)
            circumstances.added_mib.append(max(peak - self.held, 0.0))


def _seconds_waited() -> float | None:
    """How long some thread of this machine has waited for a core since it was started; None where nobody counts."""
    try:
        found = re.search(r"some .*total=(\d+)", _PRESSURE.read_text())
    except OSError:
        return None
    return int(found.group(1)) / 1e6 if found else None


def _reset_memory(device: str) -> float | None:
    """Forget the peak; returns what is held now, in MiB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MIB
    try:
        _CLEAR.write_text(RESET_PEAK)
    except OSError:
        return None
    return _status("VmRSS")


def _peak_memory(device: str) -> float | None:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / MIB
    return _status("VmHWM")


def _status(key: str) -> float | None:
    """A line of /proc/self/status, in MiB."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else None
