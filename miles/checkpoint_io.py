"""Hugging Face checkpoint folders: found, read tensor by tensor, and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from miles.durable import put_in_place, sync
from miles.errors import CheckpointError, ConfigError
from miles.types import WeightGroup

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")

# ----------------------------------------------------------------------------------------------------------- finding


def resolve_checkpoint(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else a download (or cached copy) of that hub repository.

    Raises:
        ConfigError: there is no such folder or repository, or it is not a checkpoint.
    """
    if folder := local_checkpoint(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"checkpoint {name!r}{at} is neither a folder here nor could it be fetched from the hub: {reason}. "
            "Give the path of a local folder, check the name and the connection (`miles doctor --online`), or set "
            "HF_TOKEN if the repository is private or gated"
        ) from error


def local_checkpoint(name: str) -> Path | None:
    """The folder that `name` is, or None where it can only be a name on the hub. Nothing is connected to.

    Raises:
        ConfigError: it is neither, or the folder is no checkpoint.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
        return folder
    if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"no checkpoint folder at {folder} (a hub name is written `owner/name`)")
    return None


# ----------------------------------------------------------------------------------------------------------- reading


def read_weights(folder: Path, device: str = "cpu") -> Iterator[WeightGroup]:
    """Every tensor of a safetensors checkpoint, one at a time: `{name: tensor}`. Files are mapped, not loaded.

    Raises:
        CheckpointError: no weights, a missing file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    for path, names in weight_files(folder).items():
        try:
            with safe_open(path, framework="pt", device=device) as file:
                there = set(file.keys())
                absent = [name for name in names if name not in there]
                if absent:
                    raise CheckpointError(f"{path} lacks {absent[0]!r}, which {folder / INDEX} says it holds")
                for name in names or sorted(there):
                    yield {name: file.get_tensor(name)}
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}; the file is damaged or cut off") from error


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, each with the tensors it holds (empty: whatever is in it).

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    if (folder / INDEX).is_file():
        try:
            placed = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / INDEX} is not an index of safetensors files: {error!r}") from error
        files: dict[Path, list[str]] = {}
        for name, file in placed.items():
            files.setdefault(folder / file, []).append(name)
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names")
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"{pickled[0]} is a pickle, which is not read: convert it to safetensors" if pickled else "nothing is there"
    raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}: {hint}")


# ----------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    directory: Path,
    groups: Iterable[WeightGroup],
    source: Path,
    *,
    write: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint that transformers loads: weights from `groups`, all else (config, tokenizer) from `source`.

    Written beside `directory`, synced to disk, and renamed: a reader sees the old folder, or the new one, whole. With
    `write=False` the groups are only walked through, for ranks that take part in gathering what another one writes.

    Raises:
        CheckpointError: it could not be written; nothing is left behind, and what was there before is untouched.
    """
    if not write:
        for _ in groups:
            pass
        return
    from safetensors import SafetensorError

    directory = Path(os.path.abspath(directory))
    partial = directory.parent / f".{directory.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype = _write_weights(partial, groups, shard_bytes)
        _copy_rest(source, partial, dtype)
        for path in [*partial.iterdir(), partial]:
            sync(path)
        put_in_place(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {directory} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """With the permissions that any new file has there: safetensors 0.8 writes for its owner alone (its issue 782), and
    engines may be somebody else's.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def _write_weights(folder: Path, groups: Iterable[WeightGroup], shard_bytes: int) -> str:
    """Shards and their index; returns the name of the weights' dtype, of the largest share of bytes if they differ."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0
    by_dtype: dict[str, int] = {}

    def flush() -> None:
        nonlocal pending_bytes
        write_safetensors(pending, folder / f"{len(shards)}.part", {"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for group in groups:
        for name, tensor in group.items():
            size = tensor.numel() * tensor.element_size()
            if pending and pending_bytes + size > shard_bytes:
                flush()
            # A group is only valid until the next one comes, and may hold views of one fused tensor.
            pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
            pending_bytes += size
            total += size
            dtype = str(tensor.dtype).removeprefix("torch.")
            by_dtype[dtype] = by_dtype.get(dtype, 0) + size
    if not total:
        raise CheckpointError("there are no weights to write")
    flush()
    _name_shards(folder, shards, total)
    return max(by_dtype, key=lambda dtype: by_dtype[dtype])


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Final names, now that their number is known."""
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    placed: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        placed |= dict.fromkeys(names, file)
    contents = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(contents, indent=2) + "\n")


def _copy_rest(source: Path, folder: Path, dtype: str) -> None:
    """Everything of the source checkpoint but its weights; the config says the dtype that was written."""
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
