"""Attention kernels that take samples end to end with their bounds: torch's own, and those of the flash-attn packages.

What a kernel is told of a packing are tensors and numbers (`Spans`), so that a compiled layer serves every packing. A
stretch that continues a shared prompt has the prompt's keys and values gathered in front of its own: queries and keys
then have bounds of their own, aligned at their ends.

`T` tokens, `A` attention heads, `D` their size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from miles.api import ConfigError
from miles.builtins.fsdp.prefixes import Stretch

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of models whose attention is of another form; dropping one would be silently wrong."""
LARGEST_HEAD = 256
"""The largest head that torch's flash attention computes."""
FLASH_PACKAGES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")
"""FlashAttention 3 and 4, which want a GPU of compute capability 9.0, and 2."""


GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch's kernel takes fewer key heads than query heads; later versions want to be told so."""


class Spans(NamedTuple):
    """Where the queries and keys of each stretch lie."""

    query_bounds: Tensor
    """int32, as `key_bounds`."""
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    key_places: Tensor | None
    """Which tokens' keys these are; None: those of all tokens, in their order."""

    @classmethod
    def of(cls, stretches: Sequence[Stretch], device: torch.device | str, gathers: bool = False) -> Spans:
        """`gathers`: with `key_places` in any case, as the compiler has seen others."""
        lengths = [stretch.length for stretch in stretches]
        runs = [[stretch.context, stretch] if stretch.context else [stretch] for stretch in stretches]
        reach = [sum(part.length for part in run) for run in runs]
        places = None
        if reach != lengths or gathers:
            tokens = [torch.arange(part.start, part.start + part.length) for run in runs for part in run]
            places = torch.cat(tokens).to(device)
        query_bounds, key_bounds = (
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (lengths, reach)
        )
        return cls(query_bounds, key_bounds, max(lengths), max(reach), places)


def varlen_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface through torch's varlen_attn: `[1, A, T, D]` queries and keys, returns
    `[1, T, A, D]`."""
    refuse(module, kwargs)
    spans: Spans = packed.spans
    kernel: Callable[..., Any] = varlen_attn
    out_TAD = kernel(
        *_per_token(query, key, value, spans),
        *spans[:4],
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **GROUPED,
    )
    return out_TAD.unsqueeze(0), None


def flash_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same through flash-attn; its backward is deterministic where torch's kernels are asked to be."""
    refuse(module, kwargs)
    spans: Spans = packed.spans
    out_TAD = flash_kernel()(
        *_per_token(query, key, value, spans),
        *spans[:4],
        softmax_scale=scaling,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **({"window_size": (sliding_window - 1, 0)} if sliding_window else {}),
    )
    if isinstance(out_TAD, tuple):  # FlashAttention 4, and 3 in some versions, return the normaliser, too
        out_TAD = out_TAD[0]
    return out_TAD.unsqueeze(0), None


def _per_token(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> list[Tensor]:
    """`[T, A, D]` each, keys and values as `spans` has them."""
    query_TAD, *keys = (x[0].transpose(0, 1) for x in (query, key, value))
    places = spans.key_places
    return [query_TAD, *(keys if places is None else [x.index_select(0, places) for x in keys])]


def refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for attention that is not plain and causal."""
    odd = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if not getattr(module, "is_causal", True):
        odd.append("is_causal=False")
    if odd:
        raise ConfigError(f"the attention of {type(module).__name__} uses {', '.join(odd)}; backend `fsdp` does not")


@cache
def flash_kernel() -> Callable[..., Any]:
    """`flash_attn_varlen_func` of the first package that is there and runs on this GPU."""
    recent = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
    missing: ImportError | AttributeError | None = None
    for package in FLASH_PACKAGES if recent else FLASH_PACKAGES[-1:]:
        try:
            return import_module(package).flash_attn_varlen_func
        except (ImportError, AttributeError) as error:
            missing = error
    raise ConfigError(
        f"train.attention='flash' needs a flash-attn package ({missing}); install one (`pip install flash-attn "
        "--no-build-isolation`, or flash-attn-4; CUDA only) or use --attention varlen (in torch) or sdpa"
    ) from missing


def suits_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's varlen_attn computes heads of this size there."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_size <= LARGEST_HEAD
        and head_size % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
