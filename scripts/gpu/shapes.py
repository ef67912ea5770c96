"""Shapes of models for measurements, and checkpoints of them with random weights: nothing is fetched.

make_checkpoint(folder, "0.6B")
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True,
    },
    "tiny-moe": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False, "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    },
    "0.6B": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "4B": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "moe": {  # 1.4 billion parameters, 0.7 of them at work on a token; untied, as all Qwen3-MoE are
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 24, "num_attention_heads": 16,
        "tie_word_embeddings": False, "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
}  # fmt: skip
"""Of Qwen3, and of Qwen3-MoE where there are experts, on top of `COMMON`."""


def imported(path: Path) -> ModuleType:
    """A Python file as a module, by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_config(shape: str, **changes: Any) -> Any:
    """The transformers config of a shape."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    fields = {**COMMON, **SHAPES[shape], **changes}
    return (Qwen3MoeConfig if "num_experts" in fields else Qwen3Config)(**fields)


def make_checkpoint(
    folder: Path,
    shape: str,
    device: str = "cpu",
    *,
    weights: bool = True,
    ends: bool = True,
    deviation: float = 0.05,
    parity: float = 0.0,
) -> Any:
    """A checkpoint in bf16 with a tokenizer that knows bytes and the marks of ChatML.

    Args:
        device: on which weights are drawn, with this `deviation`.
        weights: False for a folder that says what the model is and holds none of it.
        ends: False for a model without a token that ends a response: all have the length that was asked for.
        parity: embeddings of even and of odd token ids are moved apart by twice this length. Random ones have nothing
            in common, and what is rewarded for all even ids would have to be learned for each by itself.

    Returns:
        Its transformers config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = imported(ROOT / "examples/qwen3-0.6b-grpo/stand_in.py").tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id if ends else None, "pad_token_id": tokenizer.pad_token_id}
    config = model_config(shape, **ids, initializer_range=deviation)
    if weights:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
            if parity:
                _part(model.get_input_embeddings().weight.data, parity)
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    else:
        config.architectures = ["Qwen3MoeForCausalLM" if "num_experts" in SHAPES[shape] else "Qwen3ForCausalLM"]
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
    return config


def _part(rows: Any, length: float) -> None:
    """Move even rows of a matrix this far along a direction, and odd ones against it."""
    import torch

    direction = length * torch.nn.functional.normalize(torch.randn(rows.shape[1]), dim=0)
    rows[0::2] += direction
    rows[1::2] -= direction
