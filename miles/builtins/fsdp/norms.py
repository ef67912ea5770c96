"""transformers' RMS norms as torch's fused ones: one kernel forward and two backward instead of some twenty.

A model of 28 layers has 112 of them, which in bf16 cost more time than its matrix products. The rollout engine
computes the same function, so the two also agree more closely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


def fuse_norms(model: nn.Module) -> int:
    """Give every norm that computes what `torch.rms_norm` does that function as its forward; returns how many.

    Norms of a kind become one subclass, so that a compiled layer serves all layers.
    """
    kinds = {kind: _fused(kind) for kind in {type(module) for module in model.modules()} if _is_plain(kind)}
    found = [module for module in model.modules() if type(module) in kinds]
    for module in found:
        module.__class__ = kinds[type(module)]
    return len(found)


def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    return type(kind.__name__, (kind,), {"forward": forward})


def _is_plain(kind: Any) -> bool:
    """Whether a class is an RMS norm of the usual form (Gemma's, for one, multiplies by 1 + weight): it is tried."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8, generator=generator).unbind()
    try:
        norm = kind(8, eps=1e-3)
        norm.weight.data.copy_(weight[0])
        return hasattr(norm, "variance_epsilon") and torch.allclose(
            norm(hidden), rms_norm(hidden, (8,), weight[0], 1e-3), atol=1e-6
        )
    except (TypeError, AttributeError, RuntimeError):
        return False
