"""Rotary position embeddings (arXiv:2104.09864), with the frequency scalings that need no knowledge of the length.

The angle of position `p` in dimension pair `d` is `p * inv_freq[d]`. Scaled variants (linear, llama3, yarn) only change
`inv_freq` and the amplitude; transformers computes both from the checkpoint's `rope_parameters`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from miles.api import ConfigError

if TYPE_CHECKING:
    from miles.builtins.torch_engine.decoder import DecoderConfig

SUPPORTED = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """`[head_dim / 2]` float32, and the factor on cosine and sine."""
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"torch engine: rope_parameters {parameters} are not supported; rope_type must be one of "
            f"{', '.join(SUPPORTED)}, over whole heads. Use another rollout engine for this model"
        )
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    described = SimpleNamespace(
        rope_parameters=parameters,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[kind](described, torch.device("cpu"))


class RotaryTable:
    """Cosines and sines of all positions below `positions`, looked up by position."""

    def __init__(self, config: DecoderConfig, positions: int, device: torch.device, dtype: torch.dtype):
        inv_freq, scale = inverse_frequencies(config)
        angles = torch.outer(torch.arange(positions).float(), inv_freq)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos_PD = torch.cat((cos, cos), -1).to(device, dtype)
        self.sin_PD = torch.cat((-sin, sin), -1).to(device, dtype)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of each token, `[T, 1, head_dim]`."""
        return self.cos_PD[positions_T].unsqueeze(1), self.sin_PD[positions_T].unsqueeze(1)


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotate each pair `(x[d], x[d + D/2])` by its angle; the sine's first half is negative already."""
    half = x_THD.shape[-1] // 2
    swapped = torch.cat((x_THD[..., half:], x_THD[..., :half]), -1)
    return torch.addcmul(x_THD * cos_T1D, swapped, sin_T1D)
