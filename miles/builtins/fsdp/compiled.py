"""torch.compile of each decoder layer: norms, rotary embeddings, activations and residuals become a few kernels.

A layer's forward is compiled inside of what wraps the layer: the hooks of FSDP2, which gather its weights, and gradient
checkpointing, which calls it again. All layers share one compilation, for any number of tokens; passes with and without
gradient have one each. Where a layer does what cannot be compiled (attention of most kinds, routing to experts), its
parts before and after are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from miles.api import BackendContext, TrainError
from miles.builtins.fsdp.memory import means_out_of_memory

COMPILATIONS = 32
"""Of one function in a process: actor, critic, reference and teachers share the layers' code."""
WIDTH = 1024
"""Numbers of a row, where a tensor has no other shape: what a kernel knows to be a multiple of 16 it reads faster."""


def compiles(context: BackendContext) -> bool:
    """`train.compile`, or what it is by default: on CUDA, where kernels that only move memory are much of a step, if
    there is what it takes. Not where runs must repeat bit for bit: the compiler tries kernels against each other."""
    config = context.config
    if config.train.compile is not None:
        return config.train.compile
    return torch.device(context.device).type == "cuda" and not config.exact and _has_compilers()


def _has_compilers() -> bool:
    """What torch.compile needs for CUDA: Triton and a C compiler."""
    names = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    return find_spec("triton") is not None and any(shutil.which(name) for name in names)


def compile_layers(lm: nn.Module) -> int:
    """Compile a transformers model's layers in place, before sharding and after all other changes; returns how many."""
    layers = decoder_layers(lm)
    for layer in layers:
        layer.forward = _explaining(torch.compile(layer.forward, dynamic=True))
    return len(layers)


def _configure() -> None:
    """The compiler's settings, which a thread has for itself."""
    if torch._dynamo.config.recompile_limit < COMPILATIONS:
        torch._dynamo.config.recompile_limit = COMPILATIONS
    # The backward pass makes normed states and products of activations again instead of keeping them: a quarter of a
    # layer's memory for hardly any time, since it reads what they are made of anyway.
    if torch._functorch.config.ban_recompute_materialized_backward:
        torch._functorch.config.ban_recompute_materialized_backward = False


def _explaining(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        _configure()
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            if means_out_of_memory(error):
                raise
            raise TrainError(
                f"torch.compile cannot compile this model's layers; --no-compile does without: {error}"
            ) from error

    return forward


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The modules that transformers keeps on one device."""
    names = set(getattr(lm, "_no_split_modules", None) or ())
    return [module for module in lm.modules() if type(module).__name__ in names]


def add_into(total: Tensor, part: Tensor) -> None:
    """`total += part` for a part of another dtype, in one kernel that reads each number once. torch's own reads them
    one by one."""
    if total.numel() % WIDTH or not (total.is_contiguous() and part.is_contiguous()):
        total += part
        return
    rows, more = total.view(-1, WIDTH), part.view(-1, WIDTH)
    torch._dynamo.mark_static(rows, 1)
    torch._dynamo.mark_static(more, 1)
    _adding()(rows, more)


@cache
def _adding() -> Callable[[Tensor, Tensor], None]:
    return torch.compile(_add, dynamic=True)


def _add(total: Tensor, part: Tensor) -> None:
    total += part
