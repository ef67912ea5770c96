"""The policy's config, tokenizer, bridge, chat format, precision and transforms, from what the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles.config import Config, Spec
from miles.errors import ConfigError
from miles.kinds import KINDS
from miles.protocols import Bridge, ChatContext, ChatFormat, ModelTransform, PrecisionScheme
from miles.registry import Registry

AUTO = "auto"


def load_hf_config(checkpoint: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def load_tokenizer(checkpoint: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def providing(registry: Registry, kind: str, model_type: str) -> str | None:
    """Name of the component of a kind that says it serves this Hugging Face model type.

    Raises:
        ConfigError: two of them do, and somebody has to choose.
    """
    offers = [offer for offer in registry.offers(kind) if model_type in offer.value.provides]
    if len(offers) > 1:
        claims = " and ".join(f"{offer.name!r} ({offer.plugin})" for offer in offers)
        raise ConfigError(f"model type {model_type!r} is served by {claims}: choose one with {KINDS[kind].keys[0]}")
    return offers[0].name if offers else None


def bridge_for(registry: Registry, config: Config, hf_config: Any) -> Bridge:
    """The configured bridge; `auto` goes by model type."""
    spec = config.model.bridge
    if spec.name == AUTO:
        name = providing(registry, "bridges", hf_config.model_type)
        if name is None:
            known = sorted({t for offer in registry.offers("bridges") for t in offer.value.provides})
            raise ConfigError(
                f"no installed bridge knows model type {hf_config.model_type!r} (known: {', '.join(known) or 'none'}); "
                "install a plugin that provides it, or name one with --bridge"
            )
        spec = Spec(name=name, options=spec.options)
    return registry.build("bridges", spec)


def end_token_ids(checkpoint: Path) -> tuple[int, ...]:
    """What the checkpoint's generation config says ends a response; nothing when it has none."""
    from transformers import GenerationConfig

    if not (checkpoint / "generation_config.json").exists():
        return ()
    ids = GenerationConfig.from_pretrained(checkpoint).eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def chat_format_for(
    registry: Registry, config: Config, hf_config: Any, tokenizer: Any, end_tokens: tuple[int, ...] = ()
) -> ChatFormat:
    """The configured chat format; `auto` goes by model type, then by the tokenizer's own template."""
    spec = config.data.chat_format
    if spec.name == AUTO:
        spec = Spec(name=providing(registry, "chat_formats", hf_config.model_type) or "template", options=spec.options)
    context = ChatContext(tokenizer, config.data.chat_template_kwargs, end_tokens)
    return registry.build("chat_formats", spec, context=context)


def precision_for(registry: Registry, config: Config) -> PrecisionScheme:
    """The configured scheme, told what the trainer computes in; a backend tells it about its model besides."""
    scheme: PrecisionScheme = registry.build("precision_schemes", config.precision.scheme)
    scheme.configure(config.train.train_backend.name, {"dtype": config.train.dtype})
    return scheme


def transforms_for(registry: Registry, config: Config) -> list[ModelTransform]:
    return [registry.build("model_transforms", spec) for spec in config.model.transforms]


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` when a GPU is there, else `cpu`."""
    import torch

    if device != AUTO:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
