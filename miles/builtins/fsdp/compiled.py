"""torch.compile of each decoder layer: norms, rotary embeddings, activations and residuals become a few kernels.

A layer's forward is compiled inside of what wraps the layer: the hooks of FSDP2, which gather its weights, and gradient
checkpointing, which calls it again. All layers share one compilation, for any number of tokens; passes with and without
gradient have one each. Where a layer does what cannot be compiled (attention of most kinds, routing to experts), its
parts before and after are.
"""

from __future__ import annotations

import torch
from torch import nn

from miles.api import BackendContext

COMPILATIONS = 32
"""Of one function in a process: actor, critic, reference and teachers share the layers' code."""


def compiles(context: BackendContext) -> bool:
    """`train.compile`, or what it is by default: on CUDA, where kernels that only move memory are the larger part of a
    step. Not where runs must repeat bit for bit: the compiler tries kernels against each other as it goes."""
    wanted = context.config.train.compile
    if wanted is not None:
        return wanted
    return torch.device(context.device).type == "cuda" and not context.config.run.deterministic


def compile_layers(lm: nn.Module) -> int:
    """Compile a transformers model's layers in place, before sharding and after all other changes; returns how many."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    layers = decoder_layers(lm)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    return len(layers)


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The modules that transformers keeps on one device."""
    names = set(getattr(lm, "_no_split_modules", None) or ())
    return [module for module in lm.modules() if type(module).__name__ in names]
