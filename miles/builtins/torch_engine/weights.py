"""Weights on their way into the decoder: from a checkpoint on disk, or from the trainer.

A load is complete when every tensor of the `decoder` world arrived exactly once. Until then the decoder must not serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from miles.api import Bridge, EngineError, MilesError, WeightGroup, WeightSyncError
from miles.builtins.torch_engine.decoder import Decoder


def checkpoint_groups(checkpoint: Path) -> Iterator[WeightGroup]:
    """The tensors of a checkpoint folder, one at a time."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise EngineError(f"torch engine: {checkpoint} holds no *.safetensors file to load weights from")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield {name: tensors.get_tensor(name)}


class WeightLoader:
    """Translates incoming groups through the bridge and copies them into place, checking that all arrive."""

    def __init__(self, decoder: Decoder, bridge: Bridge, hf_config: Any):
        self.decoder, self.bridge, self.hf_config = decoder, bridge, hf_config

    def held(self) -> Iterator[WeightGroup]:
        """The decoder's weights, under checkpoint names."""
        groups = ({name: tensor} for name, tensor in self.decoder.weights.items())
        yield from self.bridge.from_world("decoder", self.hf_config, groups)

    def load(self, groups: Iterable[WeightGroup]) -> None:
        """Straight into the decoder: what was there is gone as soon as this starts, even if it fails."""
        self._copy_all(groups, self.decoder.weights)
        self.decoder.refresh()

    def stage(self, groups: Iterable[WeightGroup]) -> dict[str, Tensor]:
        """Into a second copy, while the decoder goes on serving."""
        staged = {name: torch.empty_like(tensor) for name, tensor in self.decoder.weights.items()}
        self._copy_all(groups, staged)
        return staged

    def commit(self, staged: Mapping[str, Tensor]) -> None:
        """Make a staged copy the decoder's weights. In place: CUDA graphs know the tensors by address."""
        for name, tensor in self.decoder.weights.items():
            tensor.copy_(staged[name])
        self.decoder.refresh()

    @torch.no_grad()
    def _copy_all(self, groups: Iterable[WeightGroup], targets: Mapping[str, Tensor]) -> None:
        missing = set(targets)
        try:
            for group in self.bridge.to_world("decoder", self.hf_config, groups):
                for name, tensor in group.items():
                    self._copy(name, tensor, targets, missing)
        except (WeightSyncError, EngineError):
            raise
        except MilesError as error:
            raise WeightSyncError(f"torch engine: {error}") from error
        if missing:
            raise WeightSyncError(
                f"torch engine: {len(missing)} of {len(targets)} tensors did not arrive: {_some(missing)}"
            )

    def _copy(self, name: str, tensor: Tensor, targets: Mapping[str, Tensor], missing: set[str]) -> None:
        target = targets.get(name)
        if target is None or name not in missing:
            problem = "came twice" if target is not None else "is not one of this model"
            raise WeightSyncError(f"torch engine: decoder tensor {name!r} {problem}")
        if tensor.shape != target.shape:
            raise WeightSyncError(
                f"torch engine: decoder tensor {name!r} has shape {list(tensor.shape)}, expected {list(target.shape)}"
            )
        missing.remove(name)
        target.copy_(tensor)


def _some(names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (" ..." if len(ordered) > limit else "")
