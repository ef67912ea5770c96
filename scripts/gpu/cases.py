"""What scripts share that measure one case after the other: limits, figures that survive the next failure, tables.

A case is a function, or a process with a time limit. Whatever becomes of it, the next one is begun; what is known so
far lies in `$OUT/NAME.json`, and a table of all of it is printed last.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""Set in every process, those that start others in an environment of their own included."""
LIBRARIES = ("torch", "transformers", "sglang", "sglang-kernel", "sglang-router", "ray", "triton", "aiohttp")


def safe_environment(**more: str) -> dict[str, str]:
    """This process's, with this folder on the path of imports."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **SAFE, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **more}


def out_folder() -> Path:
    """`$OUT`, or a folder of its own."""
    folder = Path(os.environ.get("OUT", "/tmp/out"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Of Python, the libraries that decide, and the name of the accelerator."""
    found = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # torch would take memory to say it
    with suppress(OSError):
        found["device"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Book:
    """Figures of a script's cases."""

    def __init__(self, name: str):
        self.name = name
        self.file = out_folder() / f"{name}.json"
        self.figures: dict[str, Any] = {"versions": versions()}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and with it what was started

    def case(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Run a case; an error is a figure of it."""
        start = time.perf_counter()
        print(f"--- {self.name}: {name}", flush=True)
        try:
            figures = dict(measure())
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(figures["traceback"][-2500:], flush=True)
        self.note(name, {**figures, "case_seconds": time.perf_counter() - start})

    def note(self, name: str, figures: Mapping[str, Any]) -> None:
        self.figures[name] = figures
        self.file.write_text(json.dumps(rounded(self.figures), indent=1, default=str))

    def show(self, rows: Sequence[Sequence[Any]]) -> None:
        """A table, as Markdown, after a line that says of which versions it speaks."""
        print(f"\n{self.name}: {', '.join(f'{k} {v}' for k, v in self.figures['versions'].items())}")
        for index, row in enumerate(rows):
            print(f"| {' | '.join(shown(cell) for cell in row)} |")
            if index == 0:
                print("|" + "---|" * len(row))


def rounded(value: Any) -> Any:
    """Numbers with six digits, in whatever they stand."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return "" if cell is None else str(cell)


# ----------------------------------------------------------------------------------------------------------- processes


def run_process(
    words: Sequence[Any], log: Path, limit: float, on_line: Callable[[str], None] | None = None, **environment: str
) -> tuple[int, float]:
    """Run a command to its end, or to its limit; then nothing of it is left. What it says goes to `log`.

    Returns:
        Its exit status, and the seconds that it took.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=safe_environment(**environment),
        start_new_session=True,
    )
    alarm = threading.Timer(limit, end_group, [process])
    alarm.start()
    try:
        assert process.stdout is not None
        with log.open("w") as file:
            for line in process.stdout:
                file.write(f"{time.perf_counter() - start:6.1f}  {line}")
                file.flush()
                if on_line:
                    on_line(line)
        return process.wait(), time.perf_counter() - start
    finally:
        alarm.cancel()
        end_group(process)


def options_of(words: Sequence[str]) -> list[str]:
    """A command line without the names at its beginning."""
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[first:])


def end_group(process: subprocess.Popen) -> None:
    """Kill a process and all that it started in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def keep_logs(run_dir: Path, name: str) -> None:
    """What workers and servers of a run wrote, in `$OUT` under this name."""
    for log in sorted((run_dir / "logs").glob("*.log")):
        (out_folder() / f"{name}_{log.name}").write_bytes(log.read_bytes()[-1_000_000:])


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def descendants(ancestor: int) -> dict[int, str]:
    """Processes that a process has started, they in turn, and so on: id -> command line."""
    parents, commands = {}, {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError, ValueError):
            status = Path(f"/proc/{entry}/stat").read_text()
            parents[int(entry)] = int(status.rpartition(")")[2].split()[1])
            commands[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    found: dict[int, str] = {}
    fresh = {ancestor}
    while fresh := {pid for pid, parent in parents.items() if parent in fresh and pid not in found}:
        found |= {pid: commands[pid] for pid in fresh}
    return found


def processor_seconds(pid: int) -> float:
    """That a process has computed so far, in all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------------ the accelerator


@dataclass
class GpuWatch:
    """Samples what nvidia-smi says of each GPU in `CUDA_VISIBLE_DEVICES` (of all, if not set), ten times a second:
    memory in use, and `utilization.gpu`, the share of NVML's last sampling period (up to a second) in which a kernel
    ran. Without a GPU it sees nothing."""

    samples: list[tuple[float, list[float], list[float]]] = field(default_factory=list)
    """`time.time()`, utilisation in per cent and memory in MiB of each GPU."""

    @contextmanager
    def watching(self) -> Iterator[GpuWatch]:
        command = "nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv,noheader,nounits -lms 100"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = [*command.split(), *(["-i", visible] if visible else [])]
        try:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        except OSError:
            yield self
            return
        reader = threading.Thread(target=self._read, args=[process])
        reader.start()
        try:
            yield self
        finally:
            process.terminate()
            reader.join()

    def _read(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        before = 0.0
        for line in process.stdout:
            with suppress(ValueError):  # a driver's remark
                index, used, memory = (float(number) for number in line.split(","))
                if index <= before or not self.samples:
                    self.samples.append((time.time(), [], []))
                before = index
                self.samples[-1][1].append(used)
                self.samples[-1][2].append(memory)

    def peak_mib(self) -> list[float]:
        """The most that each GPU held."""
        return [max(column) for column in zip(*(memory for _, _, memory in self._whole()), strict=True)]

    def idle(self, windows: Sequence[tuple[float, float]]) -> float | None:
        """Share of these stretches of time in which no kernel ran, over all GPUs; None if nothing was seen."""
        inside = [used for t, used, _ in self._whole() if any(start <= t <= end for start, end in windows)]
        numbers = [number for used in inside for number in used]
        return 1 - sum(numbers) / len(numbers) / 100 if numbers else None

    def _whole(self) -> list[tuple[float, list[float], list[float]]]:
        count = max((len(used) for _, used, _ in self.samples), default=0)
        return [sample for sample in self.samples if len(sample[1]) == count == len(sample[2])]
