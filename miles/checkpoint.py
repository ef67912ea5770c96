"""Checkpoints on disk: all of a step or nothing.

A checkpoint is a folder `step_000120` that holds one subfolder or file for every owner of state, and a `manifest.json`
with size and checksum of each file. It is written under a temporary name, flushed to disk, and renamed: whoever sees
the final name sees a complete checkpoint. Reading starts at the newest one whose files agree with its manifest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from miles.durable import put_in_place, sync_tree
from miles.errors import CheckpointError, WorkerError
from miles.log import logger

MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{6,})")
PIECE = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    step: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep: int | None):
        self.directory, self.keep = directory, keep

    async def save(self, step: int, write: Callable[[Path], Awaitable[None]]) -> Path:
        """Let `write(folder)` fill a checkpoint for `step`, make it durable, and drop the oldest ones.

        A step that is there already, undamaged, is left as it is: a step has one state.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final = self.directory / f"step_{step:06d}"
        partial = self.directory / f".{final.name}.partial"
        if final.exists() and await asyncio.to_thread(damage, final) is None:
            return final
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            await write(partial)
            await asyncio.to_thread(_seal, partial, step)
            put_in_place(partial, final)
        except WorkerError:
            raise  # it is the worker that failed, and not the disk
        except Exception as error:
            good = [path for path in self.newest_names() if path != final]
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {final}: {type(error).__name__}: {error}. Free "
                "some space, or choose another folder with --save. "
                f"{f'Last good one: {good[0]}' if good else 'There is no earlier one'}."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._prune(final)
        return final

    def newest_names(self) -> list[Path]:
        """Checkpoint folders, newest first, unread."""
        if not self.directory.is_dir():
            return []
        found = [(int(m[1]), path) for path in self.directory.iterdir() if (m := NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are named in a warning.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        folders = self.newest_names()
        for folder in folders:
            fault = damage(folder)
            if fault is None:
                return Checkpoint(int(NAME.fullmatch(folder.name)[1]), folder)  # type: ignore[index]
            logger.warning("checkpoint %s is damaged (%s); trying the one before it", folder, fault)
        if folders:
            raise CheckpointError(
                f"all {len(folders)} checkpoints in {self.directory} are damaged. Start afresh with --resume never or "
                "another --run-dir"
            )
        return None

    def _prune(self, written: Path) -> None:
        if self.keep is not None:
            others = [folder for folder in self.newest_names() if folder != written]
            for folder in others[self.keep - 1 :]:
                shutil.rmtree(folder)


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest good one of a folder of them or of a run directory."""
    if (path / MANIFEST).exists():
        if fault := damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged: {fault}")
        return Checkpoint(json.loads((path / MANIFEST).read_text())["step"], path)
    for folder in (path, path / "checkpoints"):
        found = CheckpointStore(folder, keep=None).newest()
        if found:
            return found
    raise CheckpointError(f"no checkpoint in {path}: expected step_NNNNNN folders, or one of them")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        promised = [(folder / name, entry["bytes"], entry["checksum"]) for name, entry in files.items()]
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    except (LookupError, TypeError, AttributeError):
        return "its manifest is of another version of miles"
    for path, size, checksum in promised:
        name = path.relative_to(folder)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"{name} has changed"
    return None


def _seal(folder: Path, step: int) -> None:
    """Flush every file to disk and write the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "checksum": _checksum(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": entries}, indent=1))
    sync_tree(folder)


def _checksum(path: Path) -> str:
    """BLAKE2b of the digests of a file's pieces, which are computed side by side."""
    with ThreadPoolExecutor() as pool:
        pieces = list(pool.map(partial(_digest, path), range(0, path.stat().st_size, PIECE)))
    return hashlib.blake2b(b"".join(pieces), digest_size=16).hexdigest()


def _digest(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(PIECE)).digest()
