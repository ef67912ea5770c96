"""Things small enough for a test: a tokenizer, models of a few thousand parameters, and what backends and engines are
built from. Nothing is fetched; everything follows from a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from torch import Tensor

from miles.config import Config, Spec
from miles.modeling import bridge_for
from miles.protocols import BackendContext, Bridge, ChatContext, ChatFormat, EngineContext
from miles.registry import Registry
from miles.types import WeightGroup

END_OF_TEXT, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The simplest of the templates that end a turn with a token of its own."""
DIMENSIONS: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Of a tiny model; for what a family has besides, its own defaults hold."""
EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
"""Of a tiny mixture of experts, as far as the family has them."""


def tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level tokenizer with a few merges, so that seams between pieces of text matter."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ċ", "Ċ"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    bytes_to_ids = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bytes_to_ids.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_to_ids.decoder = decoders.ByteLevel()
    bytes_to_ids.add_special_tokens([END_OF_TEXT, TURN_BEGIN, TURN_END])
    bytes_to_ids.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytes_to_ids, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast


def chat_format(registry: Registry, name: str = "template") -> ChatFormat:
    """A chat format on the tiny tokenizer."""
    return registry.build("chat_formats", Spec(name=name), context=ChatContext(tokenizer()))


def hf_config(model_type: str, **changes: Any) -> Any:
    """A transformers config of a family, with tiny dimensions."""
    from transformers import CONFIG_MAPPING

    family = CONFIG_MAPPING[model_type]
    experts = {name: value for name, value in EXPERTS.items() if hasattr(family(), name)}
    return family(**{**DIMENSIONS, **experts, **changes})


def model(config: Any, seed: int = 0) -> Any:
    """A transformers model with every number drawn at random: norms that are all 1 and biases that are all 0 would
    hide that two of them were exchanged."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.25 + (1.0 if "norm" in name else 0.0))
    return built


def checkpoint(folder: Path, config: Any, seed: int = 0) -> Path:
    """A Hugging Face checkpoint with the tiny tokenizer."""
    model(config, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def saved(model_type: str, seed: int = 0) -> Path:
    """Folder of a tiny checkpoint of a family, there until the process ends."""
    return checkpoint(Path(_home().name) / f"{model_type}-{seed}", hf_config(model_type), seed)


def folder(purpose: str) -> Path:
    """A new, empty folder, there until the process ends."""
    return Path(mkdtemp(prefix=f"{purpose}-", dir=_home().name))


@functools.cache
def _home() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="miles-testing-")


def log_probs_of(lm: Any, tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """`[T]`: log-probability of each token given those before it, by transformers; 0 at position 0."""
    with torch.no_grad():
        logits_TV = lm(torch.tensor([list(tokens)]), use_cache=False).logits[0].double() / temperature
    picked = logits_TV[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens)[1:, None])[:, 0]
    return torch.cat([torch.zeros(1, dtype=torch.float64), picked]).float()


def groups_of(tensors: Mapping[str, Tensor]) -> Iterator[WeightGroup]:
    """One tensor at a time, as weights are streamed."""
    return ({name: tensor} for name, tensor in tensors.items())


def merged(groups: Any) -> dict[str, Tensor]:
    """A stream of weights as one mapping; a name that comes twice is an error."""
    together: dict[str, Tensor] = {}
    for group in groups:
        twice = together.keys() & group.keys()
        assert not twice, f"came twice: {', '.join(sorted(twice))}"
        together |= {name: tensor.detach().clone() for name, tensor in group.items()}
    return together


def bridge(registry: Registry, config: Any) -> Bridge:
    """The installed bridge for a model; `pip install miles-llama` brings that of the tiny ones."""
    return bridge_for(registry, Config(), config)


def engine_context(registry: Registry, config: Any, folder: Path, load_weights: bool = True) -> EngineContext:
    """What an engine is built with to serve the checkpoint in `folder`."""
    return EngineContext(
        checkpoint=folder,
        hf_config=config,
        tokenizer=tokenizer(),
        bridge=bridge(registry, config),
        device="cpu",
        dtype="fp32",
        load_weights=load_weights,
        run_dir=folder,
    )


def backend_context(registry: Registry, config: Any, folder: Path, **changes: Any) -> BackendContext:
    """What a train backend is built with on the only rank, to train the checkpoint in `folder`."""
    settings: dict[str, Any] = {"optimizer": {"lr": 1e-2}, "run": {"seed": 3}}
    settings["model"] = {"hf_checkpoint": str(folder)}
    given: dict[str, Any] = {
        "config": Config.model_validate(settings),
        "role": "actor",
        "checkpoint": folder,
        "hf_config": config,
        "bridge": bridge(registry, config),
        "precision": None,
        "transforms": (),
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "total_steps": 10,
    }
    return BackendContext(**{**given, **changes})
