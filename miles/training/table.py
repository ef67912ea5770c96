"""The rollout batch as the trainer sees it: one row a sample, plain arrays, ready to be cut and sent to ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.types import Group, Sample, Status

COLUMNS = ("rollout_log_probs", "teacher_log_probs", "rollout_routed_experts")
"""Columns of a sample that the trainer takes along; whether one is there is decided for each sample."""


@dataclass
class Table:
    """`N` samples. Columns are lists of `N` arrays, each as long as the sample has tokens (see `miles.types`)."""

    tokens: list[np.ndarray]
    columns: dict[str, list[np.ndarray]]
    rewards_N: Tensor
    group_N: Tensor
    rollout_N: Tensor
    baseline_rewards_N: Tensor | None = None
    present: dict[str, Tensor] = field(default_factory=dict)
    """Column name -> `[N]` bool: whether the sample itself had it, or these rows are fill."""
    ids: list[int] = field(default_factory=list)
    multimodal: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_groups(cls, groups: Sequence[Group], truncated: str = "keep") -> Table:
        """One row a sample. Truncated ones are kept, given a mask of zeros (`mask`), or left out (`drop`)."""
        rows = [
            (group, sample)
            for group in groups
            for sample in group.samples
            if truncated != "drop" or sample.status is not Status.TRUNCATED
        ]
        samples = [sample for _, sample in rows]
        baselines = [group.baseline_reward for group, _ in rows]
        return cls(
            tokens=[np.asarray(s.tokens, dtype=np.int64) for s in samples],
            columns={"mask": [_mask(s, truncated) for s in samples], **_columns(samples)},
            present={name: torch.tensor([name in s.columns for s in samples]) for name in COLUMNS},
            rewards_N=torch.tensor([0.0 if s.reward is None else s.reward for s in samples], dtype=torch.float64),
            group_N=torch.tensor([s.group_id for s in samples], dtype=torch.int64),
            rollout_N=torch.tensor([s.rollout_id for s in samples], dtype=torch.int64),
            baseline_rewards_N=None if None in baselines else torch.tensor(baselines, dtype=torch.float64),
            ids=[s.id for s in samples],
            multimodal=[s.multimodal for s in samples],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        return [len(t) for t in self.tokens]

    @property
    def bounds(self) -> list[int]:
        """`N + 1` offsets of the samples when their tokens are laid end to end."""
        return [0, *accumulate(self.lengths)]

    def flat(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One column end to end, `[T]`."""
        return torch.from_numpy(np.concatenate(self.columns[name])).to(dtype)

    def has(self, name: str) -> bool:
        return name in self.columns

    def put(self, name: str, values_T: Tensor) -> None:
        """Attach a column given end to end."""
        pieces = values_T.detach().split(self.lengths)
        self.columns[name] = [piece.numpy() for piece in pieces]

    def take(self, rows: Sequence[int]) -> Table:
        """The same table with these rows alone, in this order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return replace(
            self,
            tokens=[self.tokens[r] for r in rows],
            columns={name: [column[r] for r in rows] for name, column in self.columns.items()},
            rewards_N=self.rewards_N[index],
            group_N=self.group_N[index],
            rollout_N=self.rollout_N[index],
            baseline_rewards_N=None if self.baseline_rewards_N is None else self.baseline_rewards_N[index],
            present={name: flags[index] for name, flags in self.present.items()},
            ids=[self.ids[r] for r in rows],
            multimodal=[self.multimodal[r] for r in rows],
        )


def _mask(sample: Sample, truncated: str) -> np.ndarray:
    mask = sample.loss_mask.astype(np.float32)
    return np.zeros_like(mask) if truncated == "mask" and sample.status is Status.TRUNCATED else mask


def _columns(samples: Iterable[Sample]) -> Mapping[str, list[np.ndarray]]:
    """Columns that any sample has; a sample without one gets its fill, row for row."""
    samples = list(samples)
    found: dict[str, list[np.ndarray]] = {}
    for name in COLUMNS:
        spec = next((s.specs[name] for s in samples if name in s.specs), None)
        if spec is None:
            continue
        found[name] = [
            s.columns[name]
            if name in s.columns
            else np.full((spec.rows(len(s.tokens)), *spec.width), spec.fill, spec.dtype)
            for s in samples
        ]
    return found
