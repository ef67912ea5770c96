"""What functions of upstream want to know of the model: its tokenizer and its dimensions. Each is read once a run."""

from __future__ import annotations

from typing import Any

from miles_compat.current import current


def tokenizer() -> Any:
    """The tokenizer of the policy."""
    return _once("tokenizer", lambda: load_tokenizer(_checkpoint(), **_how()))


def hf_config() -> Any:
    """The transformers config of the policy."""
    from transformers import AutoConfig

    return _once("hf_config", lambda: AutoConfig.from_pretrained(_checkpoint(), **_how()))


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **kwargs: Any) -> Any:
    """As upstream's functions call it.

    Args:
        chat_template_path: a file with a template to be used instead of the tokenizer's own.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if chat_template_path is not None:
        with open(chat_template_path, encoding="utf-8") as file:
            loaded.chat_template = file.read()
    return loaded


def _checkpoint() -> str:
    return str(current.configured().model.hf_checkpoint)


def _how() -> dict[str, Any]:
    model = current.configured().model
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def _once(name: str, read: Any) -> Any:
    if name not in current.facts:
        current.facts[name] = read()
    return current.facts[name]
