"""The policy's config, tokenizer, bridge, chat format, precision and transforms, from what the config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles.config import Config, Spec, TaskSet
from miles.config.base import AUTO
from miles.errors import ConfigError
from miles.kinds import KINDS
from miles.protocols import Bridge, ChatContext, ChatFormat, GenerateFunction, ModelTransform, PrecisionScheme
from miles.registry import Registry

ANY = "any"


def load_hf_config(checkpoint: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def load_tokenizer(checkpoint: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def providing(registry: Registry, kind: str, what: str) -> str | None:
    """Name of the component of a kind that says it is the one for `what`: a Hugging Face model type, or one of the
    words that `Component.provides` explains.

    Raises:
        ConfigError: two of them do, and somebody has to choose.
    """
    offers = [offer for offer in registry.offers(kind) if what in offer.value.provides]
    if len(offers) > 1:
        claims = " and ".join(f"{offer.name!r} ({offer.plugin})" for offer in offers)
        raise ConfigError(f"{what!r} is provided by {claims}: choose one with {KINDS[kind].keys[0]}")
    return offers[0].name if offers else None


def automatic(registry: Registry, spec: Spec, kind: str, *wanted: str) -> Spec:
    """`spec` itself, or, where it says `auto`, the component that provides the first thing wanted that one provides.

    Raises:
        ConfigError: none provides any of it, or two do.
    """
    if spec.name != AUTO:
        return spec
    for what in wanted:
        if name := providing(registry, kind, what):
            return Spec(name=name, options=spec.options)
    known = sorted({word for offer in registry.offers(kind) for word in offer.value.provides})
    raise ConfigError(
        f"{KINDS[kind].keys[0]}: no installed {KINDS[kind].singular} provides {wanted[0]!r} (provided: "
        f"{', '.join(known) or 'nothing'}); install a plugin that does, or name one"
    )


def generate_function_for(registry: Registry, task_set: TaskSet, generates: bool) -> GenerateFunction:
    """The configured one; `auto`: the data's responses when no engine generates, turns with an environment, or one."""
    wanted = "given responses" if not generates else "turns" if task_set.environment else "one turn"
    return registry.build("generate_functions", automatic(registry, task_set.generate, "generate_functions", wanted))


def bridge_for(registry: Registry, config: Config, hf_config: Any) -> Bridge:
    """The configured bridge; `auto` goes by model type."""
    return registry.build("bridges", automatic(registry, config.model.bridge, "bridges", hf_config.model_type))


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
    """The configured chat format; `auto` goes by model type, then takes the one for any."""
    spec = automatic(registry, config.data.chat_format, "chat_formats", hf_config.model_type, ANY)
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
    """`auto` becomes `cuda` when a GPU is there, else `cpu`.

    Raises:
        ConfigError: a device that torch does not know or cannot use here.
    """
    import torch

    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"resources.device {device!r} cannot be used here: {error}; --device auto, cpu or cuda"
        ) from error
    return device
