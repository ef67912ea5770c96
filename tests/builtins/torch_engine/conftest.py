"""Tiny models of each family, as transformers modules and behind the engine.

The bridge here maps transformers' parameter names to the decoder's by hand, so that these tests say something of the
engine alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from miles.builtins.torch_engine.engine import TorchEngine
from miles.builtins.torch_engine.options import TorchEngineOptions
from miles.protocols import EngineContext
from miles.types import GenerateRequest, SamplingParams

VOCAB = 67
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2_sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [1], **MOE}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 40, "norm_topk_prob": False, **MOE}),
}


def make_model(family: str, seed: int = 0, **more: Any) -> nn.Module:
    """A transformers model whose logits are spread enough to tell tokens apart."""
    name, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            nn.init.normal_(parameter, 1.0, 0.2)
        else:
            nn.init.normal_(parameter, 0.0, 0.25)
    return model


@cache
def lab_model(family: str) -> nn.Module:
    """The one that all tests have in common."""
    return make_model(family)


class HandBridge:
    """From a transformers state dict to the decoder's tensors, spelled out."""

    def config_for(self, world: str, hf: Any) -> dict[str, Any]:
        assert world == "decoder"
        moe = getattr(hf, "num_experts", 0)
        return {
            "vocab_size": hf.vocab_size,
            "hidden_size": hf.hidden_size,
            "num_layers": hf.num_hidden_layers,
            "num_heads": hf.num_attention_heads,
            "num_kv_heads": hf.num_key_value_heads,
            "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            "intermediate_size": hf.intermediate_size,
            "rms_norm_eps": hf.rms_norm_eps,
            "rope_parameters": dict(hf.rope_parameters),
            "max_position_embeddings": hf.max_position_embeddings,
            "qkv_bias": hf.model_type.startswith("qwen2"),
            "qk_norm": hf.model_type.startswith("qwen3"),
            "tie_word_embeddings": hf.tie_word_embeddings,
            "sliding_window": getattr(hf, "sliding_window", None) or None,
            "layer_types": tuple(hf.layer_types) if getattr(hf, "layer_types", None) else None,
            "hidden_act": hf.hidden_act,
            "num_experts": moe,
            "top_k_experts": hf.num_experts_per_tok if moe else 0,
            "moe_intermediate_size": hf.moe_intermediate_size if moe else 0,
            "norm_topk_prob": getattr(hf, "norm_topk_prob", False),
            "shared_intermediate_size": getattr(hf, "shared_expert_intermediate_size", 0),
            "moe_layers": tuple(i not in hf.mlp_only_layers for i in range(hf.num_hidden_layers)) if moe else (),
        }

    def to_world(self, world: str, hf: Any, groups: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yields what can be made of the tensors that came; whoever receives it notices what is missing."""
        assert world == "decoder"
        tensors = {name: tensor for group in groups for name, tensor in group.items()}
        plain = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
        plain |= {} if hf.tie_word_embeddings else {"lm_head.weight": "lm_head.weight"}
        for i in range(hf.num_hidden_layers):
            hf_names, names = f"model.layers.{i}.", f"layers.{i}."
            fused = {"qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"]}
            fused["qkv.bias"] = [f"self_attn.{part}_proj.bias" for part in "qkv"]
            fused["gate_up.weight"] = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
            fused["shared.gate_up.weight"] = [f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")]
            for name, parts in fused.items():
                if all(hf_names + part in tensors for part in parts):
                    yield {names + name: torch.cat([tensors[hf_names + part] for part in parts])}
            same = {
                "input_layernorm": "attn_norm",
                "post_attention_layernorm": "mlp_norm",
                "self_attn.o_proj": "o",
                "self_attn.q_norm": "q_norm",
                "self_attn.k_norm": "k_norm",
                "mlp.down_proj": "down",
                "mlp.gate": "router",
                "mlp.shared_expert.down_proj": "shared.down",
                "mlp.shared_expert_gate": "shared_gate",
            }
            plain |= {f"{hf_names}{old}.weight": f"{names}{new}.weight" for old, new in same.items()}
            plain |= {f"{hf_names}mlp.experts.{old}_proj": f"{names}experts.{old}" for old in ("gate_up", "down")}
        yield from ({plain[name]: tensor} for name, tensor in tensors.items() if name in plain)


class LetterTokenizer:
    """Token `i` is a letter, except: 60 reads `ab`, 61 and 62 are the halves of `é`."""

    def __len__(self) -> int:
        return VOCAB

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, tokens: Iterable[int], **_: Any) -> str:
        return b"".join(self._bytes(token) for token in tokens).decode(errors="replace")

    @staticmethod
    def _bytes(token: int) -> bytes:
        special = {60: b"ab", 61: b"\xc3", 62: b"\xa9"}
        return special.get(token) or (
            bytes([97 + token]) if token < 26 else bytes([65 + token - 26 - 8 * (token > 57)])
        )


def make_engine(
    model: nn.Module, checkpoint: Path | None = None, dtype: str = "fp32", exact: bool = False, **options: Any
) -> TorchEngine:
    """Without weights, unless a checkpoint is given."""
    context = EngineContext(
        checkpoint=checkpoint or Path("."),
        hf_config=model.config,
        tokenizer=LetterTokenizer(),
        bridge=HandBridge(),
        device="cpu",
        dtype=dtype,
        load_weights=checkpoint is not None,
        exact=exact,
        run_dir=Path("."),
    )
    return TorchEngine(TorchEngineOptions(**options), context=context)


def weights_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    return ({name: tensor} for name, tensor in model.state_dict().items())


async def started(model: nn.Module, **options: Any) -> TorchEngine:
    """An engine that serves this model as version 1."""
    engine = make_engine(model, **options)
    await engine.start()
    await engine.receive("inprocess", 1, weights_of(model))
    return engine


def request(
    tokens: list[int], seed: int = 0, *, id: str = "r", experts: bool = False, **params: Any
) -> GenerateRequest:
    return GenerateRequest(id, list(tokens), SamplingParams(**params), seed=seed, routed_experts=experts)


def run(model: nn.Module, requests: list[GenerateRequest], **options: Any) -> list[Any]:
    """All at once through a fresh engine."""

    async def main() -> list[Any]:
        engine = await started(model, **options)
        try:
            return await asyncio.gather(*(engine.generate(r) for r in requests))
        finally:
            await engine.close()

    return asyncio.run(main())


def with_engine(main: Any, family: str = "qwen3", **options: Any) -> Any:
    """Run `main(engine)` in a loop of its own, on an engine that serves this family's model as version 1."""

    async def body() -> Any:
        engine = await started(lab_model(family), **options)
        try:
            return await asyncio.wait_for(main(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(body())


@torch.no_grad()
def reference_log_probs(model: nn.Module, tokens: list[int], temperature: float = 1.0) -> Tensor:
    """`[T, V]`: row `t` is the distribution of `tokens[t + 1]`."""
    return (model(torch.tensor([tokens])).logits[0].float() / temperature).log_softmax(-1)


@torch.no_grad()
def router_choices(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """`[T - 1, L, K]`: the experts of one forward pass over all tokens, as transformers' routers said them, in
    ascending order; layers without experts hold 0."""
    layers, k = model.config.num_hidden_layers, model.config.num_experts_per_tok
    chosen = torch.zeros(len(tokens), layers, k, dtype=torch.int64)
    hooks = []
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def note(_module: Any, _inputs: Any, output: Any, i: int = i) -> None:
                chosen[:, i] = output[2].sort(-1).values

            hooks.append(layer.mlp.gate.register_forward_hook(note))
    model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return chosen[:-1].numpy()


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """Everything above, for test modules (test folders are no packages)."""
    torch.set_num_threads(1)
    return SimpleNamespace(
        VOCAB=VOCAB, FAMILIES=FAMILIES, model=lab_model, make_model=make_model, make_engine=make_engine,
        request=request, run=run, reference=reference_log_probs, weights_of=weights_of, Tokenizer=LetterTokenizer,
        router_choices=router_choices, started=started, with_engine=with_engine,
    )  # fmt: skip
