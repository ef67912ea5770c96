"""The blocks of a decoder, each a list of `Weight`s: what a tensor of the checkpoint is called in each world.

Worlds: `torch` is the transformers module, which keeps the experts of a layer in two fused tensors and otherwise uses
the checkpoint's names; `decoder` is the built-in engine's module; `megatron` is Megatron-Core's GPTModel built from
its local layer spec, `megatron_te` from its Transformer Engine spec, which fuses norms into the matrices that follow
them and keeps experts as one grouped matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.toolkit import COLUMN, ROW, Concat, Form, Op, Stack, Weight
from miles_llama.dims import Dims

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HF = "model.layers.{i}."
DECODER = "layers.{i}."
MEGATRON = "decoder.layers.{i}."
HALVES = Concat((1, 1))
"""Gate rows, then up rows."""


def forms(decoder: str, megatron: str, *ops: Op, te: str | None = None) -> dict[str, Form]:
    """A weight that engine and Megatron fuse by the same ops; `te` is its name under the Transformer Engine spec."""
    return {
        "decoder": Form(decoder, *ops),
        "megatron": Form(megatron, *ops),
        "megatron_te": Form(te or megatron, *ops),
    }


def embedding_and_head(d: Dims) -> Iterator[Weight]:
    """First and last: embedding, final norm, and a head of its own or the embedding again."""
    embedding = forms("embed.weight", "embedding.word_embeddings.weight")
    yield Weight((EMBED,), embedding, dim=COLUMN, stage="first", rows=d.vocab_size)
    yield Weight(("model.norm.weight",), forms("norm.weight", "decoder.final_layernorm.weight"), stage="last")
    head = forms("lm_head.weight", "output_layer.weight")
    if not d.tie_word_embeddings:
        yield Weight((HEAD,), head, dim=COLUMN, stage="last", rows=d.vocab_size)
        return
    yield Weight((EMBED,), {"torch": Form(HEAD)}, stage="last", copy=True)
    apart = {world: head[world] for world in ("megatron", "megatron_te")}
    yield Weight((EMBED,), apart, dim=COLUMN, stage="last_apart", rows=d.vocab_size, copy=True)


def attention(d: Dims) -> Iterator[Weight]:
    """Norm, query/key/value, output; biases and head norms where the family has them."""
    layers = range(d.num_layers)
    core = MEGATRON + "self_attention."
    norm = forms(
        DECODER + "attn_norm.weight",
        MEGATRON + "input_layernorm.weight",
        te=core + "linear_qkv.layer_norm_weight",
    )
    yield Weight((HF + "input_layernorm.weight",), norm, layers=layers)
    for kind in ["weight", "bias"] if d.qkv_bias else ["weight"]:
        interleaved = Form(core + f"linear_qkv.{kind}", Concat(d.ratio, groups=d.num_kv_heads))
        yield Weight(
            tuple(HF + f"self_attn.{part}_proj.{kind}" for part in "qkv"),
            {
                "decoder": Form(DECODER + f"qkv.{kind}", Concat(d.ratio)),
                "megatron": interleaved,
                "megatron_te": interleaved,
            },
            dim=COLUMN,
            layers=layers,
        )
    output = forms(DECODER + "o.weight", core + "linear_proj.weight")
    yield Weight((HF + "self_attn.o_proj.weight",), output, dim=ROW, layers=layers)
    if d.o_bias:
        bias = forms(DECODER + "o.bias", core + "linear_proj.bias")
        yield Weight((HF + "self_attn.o_proj.bias",), bias, layers=layers)
    for part in "qk" if d.qk_norm else "":
        head_norm = forms(DECODER + f"{part}_norm.weight", core + f"{part}_layernorm.weight")
        yield Weight((HF + f"self_attn.{part}_norm.weight",), head_norm, layers=layers)


def gated_mlp(hf: str, decoder: str, megatron: str, layers: tuple[int, ...]) -> Iterator[Weight]:
    """`down(act(gate(x)) * up(x))` under the given prefixes."""
    fused = forms(decoder + "gate_up.weight", megatron + "linear_fc1.weight", HALVES)
    yield Weight((hf + "gate_proj.weight", hf + "up_proj.weight"), fused, dim=COLUMN, layers=layers)
    down = forms(decoder + "down.weight", megatron + "linear_fc2.weight")
    yield Weight((hf + "down_proj.weight",), down, dim=ROW, layers=layers)


def mlp_norm(layers: tuple[int, ...], te: str) -> Weight:
    """The norm before an MLP; Transformer Engine fuses it into a dense one only."""
    norm = forms(DECODER + "mlp_norm.weight", MEGATRON + "pre_mlp_layernorm.weight", te=MEGATRON + te)
    return Weight((HF + "post_attention_layernorm.weight",), norm, layers=layers)


def dense_mlps(d: Dims) -> Iterator[Weight]:
    yield mlp_norm(d.dense, te="mlp.linear_fc1.layer_norm_weight")
    yield from gated_mlp(HF + "mlp.", DECODER, MEGATRON + "mlp.", d.dense)


def expert_mlps(d: Dims) -> Iterator[Weight]:
    """Router, experts, and the expert that every token passes where the family has one."""
    layers = d.sparse
    yield mlp_norm(layers, te="pre_mlp_layernorm.weight")
    router = forms(DECODER + "router.weight", MEGATRON + "mlp.router.weight")
    yield Weight((HF + "mlp.gate.weight",), router, layers=layers)
    one, many = MEGATRON + "mlp.experts.local_experts.{e}.", MEGATRON + "mlp.experts."
    yield Weight(
        (HF + "mlp.experts.{e}.gate_proj.weight", HF + "mlp.experts.{e}.up_proj.weight"),
        {
            "torch": Form(HF + "mlp.experts.gate_up_proj", HALVES, Stack()),
            "decoder": Form(DECODER + "experts.gate_up", HALVES, Stack()),
            "megatron": Form(one + "linear_fc1.weight", HALVES),
            "megatron_te": Form(many + "linear_fc1.weight{e}", HALVES),
        },
        dim=COLUMN,
        layers=layers,
        experts=d.num_experts,
    )
    yield Weight(
        (HF + "mlp.experts.{e}.down_proj.weight",),
        {
            "torch": Form(HF + "mlp.experts.down_proj", Stack()),
            "decoder": Form(DECODER + "experts.down", Stack()),
            "megatron": Form(one + "linear_fc2.weight"),
            "megatron_te": Form(many + "linear_fc2.weight{e}"),
        },
        dim=ROW,
        layers=layers,
        experts=d.num_experts,
    )
    if d.shared_intermediate_size:
        shared = MEGATRON + "mlp.shared_experts."
        yield from gated_mlp(HF + "mlp.shared_expert.", DECODER + "shared.", shared, layers)
        gate = forms(DECODER + "shared_gate.weight", shared + "gate_weight")
        yield Weight((HF + "mlp.shared_expert_gate.weight",), gate, layers=layers)


def decoder(d: Dims) -> list[Weight]:
    """A whole model of these blocks."""
    weights = [*embedding_and_head(d), *attention(d)]
    if d.dense:
        weights += dense_mlps(d)
    if d.sparse:
        weights += expert_mlps(d)
    return weights
