"""A backend's state as files that any number of ranks can read.

torch.distributed.checkpoint writes what each rank holds into a file of its own and, in `.metadata`, which part of which
tensor lies where. The names and dtypes do not depend on the number of ranks, so a state that four ranks wrote is read
by one or by three, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from miles.api import CheckpointError


def write_state(directory: Path, tensors: Mapping[str, Tensor], alone: bool) -> None:
    """All ranks together, each the parts it holds; tensors that all of them hold are written once.

    Args:
        alone: one rank, which may be without a process group.

    Raises:
        CheckpointError: on all ranks, when one of them could not write.
    """
    writer = dcp.FileSystemWriter(directory, sync_files=False)  # whoever completes a checkpoint flushes all of it
    with _one_error(f"{directory} could not be written"):
        dcp.save({name: t.detach() for name, t in tensors.items()}, storage_writer=writer, no_dist=alone)


def read_state(
    directory: Path, tensors: Mapping[str, Tensor], alone: bool, *, prefix: tuple[str, ...], rounded: Collection[str]
) -> None:
    """Fill `tensors` in place, bit for bit.

    Args:
        alone: one rank, which may be without a process group.
        prefix: saved names that begin otherwise are passed over.
        rounded: tensors that may have been saved in another floating dtype than they have here.

    Raises:
        CheckpointError: there is no state, it is damaged, or it is that of another model or optimizer.
    """
    reader = dcp.FileSystemReader(directory)
    if not (directory / ".metadata").is_file():
        raise CheckpointError(
            f"{directory} holds no state of backend `fsdp` (.metadata is missing): it was written by another backend "
            "or another version of miles, or is damaged. Choose another checkpoint with --load, or --resume never"
        )
    with _one_error(f"{directory} is damaged; choose an earlier checkpoint with --load"):
        saved = reader.read_metadata().state_dict_metadata
    there = {name for name in saved if name.startswith(prefix)}
    if differing := there.symmetric_difference(tensors):
        names = ", ".join(sorted(differing)[:5])
        raise CheckpointError(f"{directory} is of another model or optimizer: {len(differing)} names differ ({names})")
    for name, tensor in sorted(tensors.items()):
        entry = saved[name]
        assert isinstance(entry, TensorStorageMetadata)
        found, dtype = entry.size, entry.properties.dtype
        alike = dtype == tensor.dtype or (name in rounded and dtype.is_floating_point)
        if found != tensor.shape or not alike:
            here = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{directory} is of another model: {name!r} is {dtype} {tuple(found)}, here {here}. Give this run the "
                "model and --train-dtype of the other"
            )
    with _one_error(f"{directory} is damaged; choose an earlier checkpoint with --load"):
        dcp.load({name: t.detach() for name, t in tensors.items()}, storage_reader=reader, no_dist=alone)


@contextmanager
def _one_error(message: str) -> Iterator[None]:
    """Whatever goes wrong as a CheckpointError. torch's own is no `Exception`, and holds those of all ranks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            yield
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        cause = _first(failure)
        raise CheckpointError(f"{message} (rank {rank}: {type(cause).__name__}: {cause})") from error
    except Exception as error:
        raise CheckpointError(f"{message} ({type(error).__name__}: {error})") from error


def _first(error: BaseException) -> BaseException:
    """What set it off: a full disk makes torch's file writer stumble over its own position as well."""
    while error.__context__ is not None:
        error = error.__context__
    return error
