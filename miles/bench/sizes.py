"""How much work a round is: a model and workloads for two cores of a CPU, for one GPU, and for nothing but trying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """Models are Qwen3 with random weights. Token counts are of one round."""

    model: Mapping[str, Any]
    dtype: str = "fp32"
    seconds: float = 0.3
    """What takes less is done again until that much time has passed, within one round."""
    requests: int = 64
    """Responses that are generated together."""
    prompt_len: int = 16
    new_tokens: int = 64
    longest: int = 256
    """Lengths of variable responses are spread evenly up to this."""
    shared_prompt_len: int = 512
    shared_samples: int = 8
    """Responses to each shared prompt."""
    shared_prompts: int = 4
    train_batches: int = 1
    """Batches of `requests` variable responses in one round of training."""
    packed_samples: int = 100_000
    advantage_samples: int = 16_384
    rewarded_samples: int = 20_000
    job_steps: int = 4
    """Steps of the whole job that are timed, one round."""


SMALL = {
    "vocab_size": 256,  # a token a byte: the one that ends a response lies just outside, and cannot be drawn
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
SIZES = {
    "cpu": Size(SMALL),
    "gpu": Size(QWEN3_06B, "bf16", prompt_len=64, new_tokens=128, longest=512, shared_prompts=8),
    "smoke": Size(
        {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8},
        requests=4, new_tokens=4, longest=8, shared_prompt_len=32, shared_samples=2, shared_prompts=2,
        seconds=0, packed_samples=100, advantage_samples=32, rewarded_samples=100, job_steps=1,
    ),
}  # fmt: skip
"""Name -> sizes. `smoke` shows that everything runs; its numbers mean nothing."""
