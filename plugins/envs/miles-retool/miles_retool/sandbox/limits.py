"""What one call may use."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Of one call, all its processes together where nothing else is said."""

    seconds: float = 120.0
    """Wall time; and CPU time of each process, all its threads together."""
    memory_mb: int = 1024
    """Private memory in MiB, beyond what the interpreter had before; also the address space of each process. The sum
    over processes is looked at every `call.TICK` seconds."""
    processes: int = 32
    """Processes and threads at the same time."""
    file_mb: int = 16
    """Size of one file in MiB."""
    disk_mb: int = 64
    """All files in MiB. Enforced with namespaces only; without, files are limited one by one."""
    open_files: int = 64
    """In one process."""
    output_kb: int = 64
    """KiB of standard output and standard error. A program that says more is stopped."""

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        wrong = [f"{name}={value}" for name, value in asdict(self).items() if not 0 < value < math.inf]
        few = [f"open_files={self.open_files} (at least 8)"] if 0 < self.open_files < 8 else []
        return [*(f"{fault} (more than 0)" for fault in wrong), *few]
