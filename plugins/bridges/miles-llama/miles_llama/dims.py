"""`Dims`: what a decoder of this kind is made of, read from a Hugging Face config, and said as each world says it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Dims:
    """A pre-norm decoder with rotary grouped-query attention and gated MLPs, some of which may be mixtures.

    The fields are the options of the built-in engine's decoder: `asdict(dims)` builds one.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    """As Hugging Face has it: `rope_type`, `rope_theta`, and the scaling's own values."""
    max_position_embeddings: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    hidden_act: str
    sliding_window: int | None
    layer_types: tuple[str, ...]
    """Of each layer: `full_attention` or `sliding_attention`."""
    num_experts: int
    """0: all layers are dense."""
    top_k_experts: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    """Weights of the chosen experts are scaled to sum to 1."""
    shared_intermediate_size: int
    """Of the expert that every token passes; 0: there is none."""
    moe_layers: tuple[bool, ...]

    @classmethod
    def of(
        cls, hf: Any, *, qkv_bias: bool, o_bias: bool, qk_norm: bool = False, moe_layers: tuple[bool, ...] | None = None
    ) -> Dims:
        """Read a transformers config; what configs leave to the family's code comes as arguments."""
        sliding = getattr(hf, "sliding_window", None) or None
        one_kind = "sliding_attention" if sliding else "full_attention"
        layers = hf.num_hidden_layers
        moe = moe_layers or (False,) * layers
        sparse = any(moe)
        return cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            num_layers=layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            intermediate_size=hf.intermediate_size,
            rms_norm_eps=hf.rms_norm_eps,
            rope_parameters=dict(hf.rope_parameters),
            max_position_embeddings=hf.max_position_embeddings,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
            tie_word_embeddings=bool(hf.tie_word_embeddings),
            hidden_act=hf.hidden_act,
            sliding_window=sliding,
            layer_types=tuple(getattr(hf, "layer_types", None) or (one_kind,) * layers),
            num_experts=hf.num_experts if sparse else 0,
            top_k_experts=hf.num_experts_per_tok if sparse else 0,
            moe_intermediate_size=hf.moe_intermediate_size if sparse else 0,
            norm_topk_prob=bool(hf.norm_topk_prob) if sparse else False,
            shared_intermediate_size=getattr(hf, "shared_expert_intermediate_size", 0) or 0 if sparse else 0,
            moe_layers=moe,
        )

    @property
    def ratio(self) -> tuple[int, int, int]:
        """How the rows of query, key and value compare."""
        return (self.num_heads, self.num_kv_heads, self.num_kv_heads)

    @property
    def dense(self) -> tuple[int, ...]:
        """Layers with a plain MLP."""
        return tuple(i for i, moe in enumerate(self.moe_layers) if not moe)

    @property
    def sparse(self) -> tuple[int, ...]:
        """Layers with a mixture of experts."""
        return tuple(i for i, moe in enumerate(self.moe_layers) if moe)

    def for_decoder(self) -> dict[str, Any]:
        """Options of the built-in engine's `DecoderConfig`."""
        return asdict(self)
