"""Which experts a rollout chose, as they travel from an engine to the trainer. Needs no torch.

One row a forward position, `[layers, top_k]`: row `t` is of the pass that read `tokens[t]` and predicted the next, so
a sample of `T` tokens has `T - 1`. Layers without experts hold 0. On the way a number is as small as the model allows,
since there are many (48 layers of 8 choices are 384 of them a token):

    experts    dtype   not recorded
    to 255     uint8   255, which is then no expert
    to 32,768  int16   -1
    beyond     int32   -1

Servers speak int32, which `compact_experts` narrows as soon as it arrives, and so does a replay, for which
`expert_choices` widens what it needs when it needs it. Whoever is in between copies rows and looks at the dtype alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from miles.errors import EngineError
from miles.types import ROUTED_EXPERTS, Column, Sample, routed_experts_column

if TYPE_CHECKING:
    from torch import Tensor

Rows = TypeVar("Rows", np.ndarray, "Tensor")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")


class Routing(NamedTuple):
    """How a model routes."""

    layers: int
    """All of them, those without experts too."""
    top_k: int
    experts: int

    @classmethod
    def of(cls, hf_config: Any) -> Routing | None:
        """From a transformers config; None for a dense model."""
        text = hf_config.get_text_config()
        experts, top_k = _first(text, EXPERTS), _first(text, TOP_K)
        return cls(text.num_hidden_layers, top_k, experts) if experts and top_k else None


def _first(config: Any, names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), 0)


def compact_experts(choices: np.ndarray, experts: int) -> np.ndarray:
    """Choices of a model with this many experts in the dtype in which they travel.

    Args:
        choices: integers `[..., layers, top_k]`, -1 where nothing was recorded. They are copied, if need be.

    Raises:
        EngineError: a number is no expert of the model.
    """
    if choices.size and not -1 <= choices.min() <= choices.max() < experts:
        raise EngineError(
            f"routed experts from {choices.min()} to {choices.max()}: the model has {experts} (0 to {experts - 1}); "
            "-1 says that nothing was recorded"
        )
    layers, top_k = choices.shape[-2:]
    dtype = routed_experts_column(layers, top_k, experts).dtype
    return choices.astype(dtype, copy=False)  # -1 wraps around to 255, the fill


def experts_column(rows: np.ndarray) -> Column:
    """The column that rows of this dtype, `[n, layers, top_k]`, belong to."""
    _, layers, top_k = rows.shape
    return routed_experts_column(layers, top_k, int(np.iinfo(rows.dtype).max))


def expert_choices(rows: Rows) -> Rows:
    """What replays and servers speak: rows of expert choices as int32, -1 where nothing was recorded. An array, or a
    tensor (on whichever device)."""
    choices: Any = rows.astype(np.int32) if isinstance(rows, np.ndarray) else rows.int()
    if rows.itemsize == 1:
        choices[choices == 255] = -1
    return choices


def recorded_experts(rows: np.ndarray) -> np.ndarray:
    """Which of these rows, `[n, layers, top_k]`, were recorded, `[n]` bool. A row is there as a whole or not at all, so
    one number of it is looked at."""
    return rows[:, -1, -1] != experts_column(rows).fill


def missing_experts(sample: Sample) -> int:
    """Rows of expert choices that a sample lacks: what a replay leaves to the router."""
    rows = sample.columns.get(ROUTED_EXPERTS)
    return max(len(sample.tokens) - 1, 0) if rows is None else int((~recorded_experts(rows)).sum())
