"""The rollout batch as the trainer sees it: one row a sample, plain arrays, ready to be cut and sent to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.errors import DataError, TrainError
from miles.training.packing import one_a_token
from miles.types import LOSS_MASK, ROLLOUT_LOG_PROBS, WEIGHT_VERSION, Column, Group, Sample, Status

STAYS = (LOSS_MASK.name, WEIGHT_VERSION.name)
"""Columns of samples that the trainer does not take along; the loss mask becomes `mask`."""
OWN = (
    "mask", "weights", "advantages", "returns", "values", "old_log_probs", "ref_log_probs", "is_weights", "keep",
    "mismatch_weights", "teacher_top_k_ids", "teacher_top_k_log_probs",
)  # fmt: skip
"""Columns that the trainer writes: no sample may bring them."""


@dataclass(frozen=True)
class Lesson:
    """Who teaches a row."""

    model: str
    """The teacher among the models of a worker; empty when it is on a server."""
    teacher: str
    tokens: np.ndarray | None = None
    """What the teacher reads, where that is not what the policy read: another prompt, the same response."""


@dataclass
class Table:
    """`N` samples. Columns are lists of `N` arrays, each as long as the sample has tokens.

    Every column that any sample declares is taken along, but for `STAYS`; whether a sample has it is decided for each.
    """

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
    lessons: list[Lesson] = field(default_factory=list)
    """One a row, where there are teachers."""
    specs: dict[str, Column] = field(default_factory=dict)
    """Declarations of the columns that samples brought."""

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
        specs = _specs(samples)
        columns = {
            name: [one_a_token(s.columns.get(name), len(s.tokens), name, spec, f"sample {s.id}") for s in samples]
            for name, spec in specs.items()
        }
        return cls(
            tokens=[np.asarray(s.tokens, dtype=np.int64) for s in samples],
            columns={"mask": [_mask(s, truncated) for s in samples], **columns},
            present={
                name: torch.tensor([name in s.columns for s in samples], dtype=torch.bool)
                for name in {ROLLOUT_LOG_PROBS.name, *columns}
            },
            rewards_N=torch.tensor([0.0 if s.reward is None else s.reward for s in samples], dtype=torch.float64),
            group_N=torch.tensor([s.group_id for s in samples], dtype=torch.int64),
            rollout_N=torch.tensor([s.rollout_id for s in samples], dtype=torch.int64),
            baseline_rewards_N=None if None in baselines else torch.tensor(baselines, dtype=torch.float64),
            ids=[s.id for s in samples],
            multimodal=[s.multimodal for s in samples],
            specs=specs,
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

    def flat(self, name: str) -> Tensor:
        """One column end to end, `[T]`: float32, or float64 where it is that."""
        values = torch.from_numpy(np.concatenate(self.columns[name]))
        return values if values.dtype == torch.float64 else values.float()

    def has(self, name: str) -> bool:
        return name in self.columns

    def complete(self, name: str) -> bool:
        """Whether every sample brought this column itself."""
        return name in self.present and bool(self.present[name].all())

    def require(self, name: str, what: str) -> None:
        """Raises TrainError: a sample did not bring this column, which `what` needs."""
        present = self.present[name].tolist() if name in self.present else [False] * len(self)
        missing = [i for i, there in zip(self.ids, present, strict=True) if not there]
        if missing:
            raise TrainError(f"{what} needs {name} of samples; {len(missing)} have none, such as {missing[0]}")

    def put(self, name: str, values_T: Tensor) -> None:
        """Attach a column given end to end."""
        pieces = values_T.detach().split(self.lengths)
        self.columns[name] = [piece.numpy() for piece in pieces]

    def without(self, name: str) -> Table:
        """The same table without one column."""
        return replace(self, columns={key: rows for key, rows in self.columns.items() if key != name})

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
            lessons=[self.lessons[r] for r in rows] if self.lessons else [],
        )


def _mask(sample: Sample, truncated: str) -> np.ndarray:
    mask = sample.loss_mask.astype(np.float32)
    return np.zeros_like(mask) if truncated == "mask" and sample.status is Status.TRUNCATED else mask


def _specs(samples: Sequence[Sample]) -> dict[str, Column]:
    """Columns that any sample has, but for `STAYS`.

    Raises:
        DataError: samples declare a column differently, or as one of the trainer's.
    """
    specs: dict[str, Column] = {}
    for sample in samples:
        for name, spec in sample.specs.items():
            known = specs.setdefault(name, spec)
            if (known.offset, known.width, known.fill) != (spec.offset, spec.width, spec.fill):
                raise DataError(f"column {name!r} is declared as {known} and, in sample {sample.id}, as {spec}")
            if name in OWN:
                raise DataError(f"column {name!r} of sample {sample.id} has a name that the trainer uses: rename it")
    return {name: spec for name, spec in specs.items() if name not in STAYS}
