"""`rollout.base_types`: what a generate function of Miles' newer signature gets and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles_compat.upstream import Sample

__all__ = ["GenerateFnInput", "GenerateFnOutput"]


@dataclass(frozen=True)
class GenerateFnInput:
    state: Any
    """A `GenerateState`."""
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool

    @property
    def args(self) -> Any:
        return self.state.args


@dataclass(frozen=True)
class GenerateFnOutput:
    samples: Sample | list[Sample]
