"""Expert choices as SGLang sends them, and as samples of miles keep them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from miles.api import EngineError, RolloutError, Routing, compact_experts
from miles_compat.model import hf_config


def decoded_experts(text: str, args: Any, rows: int) -> np.ndarray:
    """`meta_info.routed_experts`: base64 of int32 `[rows, layers, top_k]`, -1 where nothing was recorded.

    Raises:
        ValueError: there are other numbers of rows or layers in it.
    """
    flat = np.frombuffer(base64.b64decode(text), "<i4")
    top_k, rest = divmod(len(flat), max(rows * args.num_layers, 1))
    if rest or (rows and not top_k):
        raise ValueError(f"{len(flat)} expert choices are not those of {rows} rows and {args.num_layers} layers")
    return flat.reshape(rows, args.num_layers, top_k)


def compacted(choices: Any) -> np.ndarray:
    """`rollout_routed_experts` of a function in the dtype of the column.

    Raises:
        RolloutError: they are no `[rows, layers, top_k]`, or not of this model.
    """
    rows, routing = np.asarray(choices), Routing.of(hf_config())
    if routing is None:
        raise RolloutError("rollout_routed_experts is set, and the model has no experts")
    if rows.ndim != 3 or rows.shape[1:] != (routing.layers, routing.top_k):
        expected = f"[tokens - 1, {routing.layers}, {routing.top_k}]"
        raise RolloutError(f"rollout_routed_experts is {list(rows.shape)}; {expected} is expected")
    try:
        return compact_experts(rows, routing.experts)
    except EngineError as error:
        raise RolloutError(f"rollout_routed_experts: {error}") from error
