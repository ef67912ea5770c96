"""The engine's own decoder: one pre-norm transformer for the Llama and Qwen families, dense and mixture-of-experts.

It differs from a transformers module in what it leaves out: no gradients, no cache objects, no padding. Tokens of all
sequences lie end to end, `[T, H]`; whoever calls it brings an `attention` that knows which token belongs to which
sequence and where keys and values are kept. Query, key and value projections are one matrix, and so are gate and up.

Dimensions: `_T` tokens, `_H` hidden, `_N` attention heads (queries, then keys), `_D` head, `_E` experts, `_K` chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.api import ConfigError
from miles.builtins.torch_engine.exact import whole_rows
from miles.builtins.torch_engine.rope import RotaryTable, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


Pad = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """A model's dimensions under the names of the `decoder` world: what `Bridge.config_for("decoder", ...)` returns."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    """As in a Hugging Face config: `rope_type`, `rope_theta` and what its scaling needs."""
    max_position_embeddings: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """RMS norm of every query and key head before the rotary embedding."""
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    """Keys a sliding layer sees, itself included."""
    layer_types: tuple[str, ...] | None = None
    """`full_attention` or `sliding_attention` for each layer; None: all slide if there is a window."""
    num_experts: int = 0
    """0 for a dense model."""
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    """Whether the chosen experts' probabilities are renormalised to sum to 1."""
    shared_intermediate_size: int = 0
    """Width of the shared expert; 0 when there is none."""
    moe_layers: tuple[bool, ...] = ()
    """For each layer whether its MLP is a mixture of experts; empty: none is."""

    def is_moe(self, layer: int) -> bool:
        return bool(self.moe_layers) and self.moe_layers[layer]

    def window(self, layer: int) -> int | None:
        """Keys that a layer sees; None: all of them."""
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides and self.sliding_window else None

    @property
    def routes(self) -> bool:
        """Whether any layer chooses experts."""
        return any(self.moe_layers)


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the `decoder` world and its shape. Rows of `qkv`: all queries, all keys, all values."""
    c = config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (c.vocab_size, c.hidden_size),
        "norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    for i in range(c.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (c.hidden_size,),
            "qkv.weight": (heads, c.hidden_size),
            "o.weight": (c.hidden_size, c.num_heads * c.head_dim),
            "mlp_norm.weight": (c.hidden_size,),
        }
        if c.qkv_bias:
            layer["qkv.bias"] = (heads,)
        if c.o_bias:
            layer["o.bias"] = (c.hidden_size,)
        if c.qk_norm:
            layer |= {"q_norm.weight": (c.head_dim,), "k_norm.weight": (c.head_dim,)}
        layer |= _moe_shapes(c) if c.is_moe(i) else _mlp_shapes(c.hidden_size, c.intermediate_size)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _mlp_shapes(hidden: int, width: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}gate_up.weight": (2 * width, hidden), f"{prefix}down.weight": (hidden, width)}


def _moe_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "router.weight": (c.num_experts, c.hidden_size),
        "experts.gate_up": (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size),
        "experts.down": (c.num_experts, c.hidden_size, c.moe_intermediate_size),
    }
    if c.shared_intermediate_size:
        shapes |= _mlp_shapes(c.hidden_size, c.shared_intermediate_size, "shared.")
        shapes["shared_gate.weight"] = (1, c.hidden_size)
    return shapes


class Attention(Protocol):
    """Knows the sequences behind a row of tokens, and keeps their keys and values."""

    def __call__(self, layer: int, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        """Store keys and values, return what each query attends to, `[T, N * D]`."""

    def record_experts(self, chosen_TLK: Tensor) -> None:
        """Keep which experts each token was routed to in each layer; layers without experts hold 0."""


def _as_it_is(x_TH: Tensor) -> Tensor:
    return x_TH


class Layer:
    """One block, as a function of its own weights."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, Tensor], index: int, pad: Pad):
        self.config, self.index, self.pad = config, index, pad
        self.w = {n.removeprefix(f"layers.{index}."): t for n, t in weights.items() if n.startswith(f"layers.{index}.")}
        self.qkv_bias = self.w.get("qkv.bias")
        self.qk_norm_ND: Tensor | None = None
        self.act = ACTIVATIONS[config.hidden_act]
        self.moe = config.is_moe(index)

    def refresh(self) -> None:
        """Bring up to date what is derived from the weights."""
        if self.config.qk_norm:
            heads = (self.config.num_heads, self.config.num_kv_heads)
            parts = [
                self.w[name].expand(n, -1) for name, n in zip(("q_norm.weight", "k_norm.weight"), heads, strict=True)
            ]
            joined = torch.cat(parts)
            self.qk_norm_ND = joined if self.qk_norm_ND is None else self.qk_norm_ND.copy_(joined)

    def __call__(self, x_TH: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> tuple[Tensor, Tensor | None]:
        """The block's output, and which experts were chosen, `[T, K]`, if it has any."""
        c, w = self.config, self.w
        normed = F.rms_norm(x_TH, (c.hidden_size,), w["attn_norm.weight"], c.rms_norm_eps)
        qkv = self._linear(normed, w["qkv.weight"], self.qkv_bias).view(len(x_TH), -1, c.head_dim)
        qk, v = qkv[:, : -c.num_kv_heads], qkv[:, -c.num_kv_heads :]
        if self.qk_norm_ND is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps) * self.qk_norm_ND
        qk = rotate(qk, *rope)
        attended = attention(self.index, qk[:, : c.num_heads], qk[:, c.num_heads :], v)
        x_TH = self._add_linear(x_TH, attended, w["o.weight"])
        if c.o_bias:
            x_TH = x_TH + w["o.bias"]
        normed = F.rms_norm(x_TH, (c.hidden_size,), w["mlp_norm.weight"], c.rms_norm_eps)
        if self.moe:
            mixed, chosen = self._mixture(normed)
            return x_TH + mixed, chosen
        hidden = self._gated(self._linear(normed, w["gate_up.weight"]))
        return self._add_linear(x_TH, hidden, w["down.weight"]), None

    def _linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(self.pad(x_TI), weight_OI, bias_O)[: len(x_TI)]

    def _add_linear(self, x_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        return torch.addmm(self.pad(x_TO), self.pad(x_TI), weight_OI.t())[: len(x_TI)]

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act(gate).mul_(up)

    def _mixture(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's chosen experts, weighted; plus the gated shared expert."""
        c, w = self.config, self.w
        scores = F.softmax(self._linear(x_TH, w["router.weight"]), -1, dtype=torch.float32)
        top_TK, chosen_TK = scores.topk(c.top_k_experts, -1)
        if c.norm_topk_prob:
            top_TK = top_TK / top_TK.sum(-1, keepdim=True)
        out = self._experts(x_TH, chosen_TK, top_TK.to(x_TH.dtype))
        if c.shared_intermediate_size:
            hidden = self._gated(self._linear(x_TH, w["shared.gate_up.weight"]))
            shared = self._linear(hidden, w["shared.down.weight"])
            gate = F.sigmoid(F.linear(self.pad(x_TH), self.pad(w["shared_gate.weight"])))[: len(x_TH), :1]
            out = out + gate * shared
        return out, chosen_TK

    def _experts(self, x_TH: Tensor, chosen_TK: Tensor, top_TK: Tensor) -> Tensor:
        """Sort the (token, choice) pairs by expert, run each expert on its stretch, and put them back."""
        sorted_, order = chosen_TK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_, self._expert_ids(x_TH.device), right=True).to(torch.int32)
        x = x_TH[order // chosen_TK.shape[1]]
        hidden = self._gated(self._grouped(x, self.w["experts.gate_up"], ends_E))
        y = self._grouped(hidden, self.w["experts.down"], ends_E)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(*chosen_TK.shape, -1) * top_TK.unsqueeze(-1)).sum(1)

    def _expert_ids(self, device: torch.device) -> Tensor:
        return torch.arange(self.config.num_experts, device=device)

    def _grouped(self, x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows `[ends[e-1], ends[e])` times expert `e`'s matrix, transposed."""
        aligned = x_MI.shape[1] * x_MI.element_size() % 16 == 0 and weight_EOI.shape[1] * x_MI.element_size() % 16 == 0
        if aligned and self.pad is _as_it_is:  # the kernel wants rows of whole 16 bytes
            return F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=ends_E)
        bounds = [0, *ends_E.tolist()]
        stretches = zip(bounds, bounds[1:], weight_EOI, strict=False)
        return torch.cat([self._linear(x_MI[a:b], w) for a, b, w in stretches if a < b])


class Decoder:
    """The model: weights under their `decoder` names, and the forward pass."""

    def __init__(
        self, config: DecoderConfig, max_len: int, device: torch.device, dtype: torch.dtype, exact: bool = False
    ):
        """`max_len` is the longest sequence it will see; weights are uninitialised. With `exact` what comes out for a
        token has the same bits whatever else is computed with it, on a CPU (`exact.py`)."""
        if config.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"torch engine: hidden_act {config.hidden_act!r} is not supported; known: {', '.join(ACTIVATIONS)}"
            )
        self.config, self.device, self.dtype = config, device, dtype
        self.exact = exact and device.type == "cpu"
        self.pad: Pad = whole_rows if self.exact else _as_it_is
        self.rope = RotaryTable(config, max_len, device, dtype)
        shapes = weight_shapes(config)
        self.place({name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()})

    def place(self, weights: dict[str, Tensor]) -> None:
        """Use these tensors from now on. Nothing is copied."""
        self.weights = weights
        self.head_VH = weights["embed.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        self.layers = [Layer(self.config, weights, i, self.pad) for i in range(self.config.num_layers)]
        self.refresh()

    def refresh(self) -> None:
        """To be called after the weights' values changed."""
        for layer in self.layers:
            layer.refresh()

    def forward(self, ids_T: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Hidden states after the last norm, `[T, H]`."""
        c = self.config
        x_TH = F.embedding(ids_T, self.weights["embed.weight"])
        rope = self.rope.at(positions_T)
        choices: list[Tensor] = []
        for layer in self.layers:
            x_TH, chosen_TK = layer(x_TH, rope, attention)
            if c.routes:
                choices.append(ids_T.new_zeros(len(ids_T), c.top_k_experts) if chosen_TK is None else chosen_TK)
        if choices:
            attention.record_experts(torch.stack(choices, 1))
        return F.rms_norm(x_TH, (c.hidden_size,), self.weights["norm.weight"], c.rms_norm_eps)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """`[T, V]` float32."""
        return F.linear(self.pad(hidden_TH), self.head_VH)[: len(hidden_TH)].float()
