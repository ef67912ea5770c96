"""Embedding models by name: encoders of transformers, and the small static one that the package wordllama brings.

A text becomes a vector of length 1, so that inner products are cosines.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from miles.api import ConfigError

WORDLLAMA = "wordllama"
Pooling = Literal["mean", "cls"]
E5 = re.compile(r"(?:^|/)(?:multilingual-)?e5-(?:small|base|large)(?:-v2)?$")


@dataclass(frozen=True)
class Embedding:
    """Everything that decides which vector a text gets. An index records it, and queries are embedded by it."""

    model: str
    """A name on the Hugging Face hub or a folder, for transformers; or `wordllama`."""
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "mean"
    """Over all tokens, or the first one alone."""
    max_length: int = 512
    """Tokens; what exceeds them is cut off."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"pooling {self.pooling!r}: {' or '.join(get_args(Pooling))} is expected")
        if self.max_length < 1:
            raise ConfigError(f"max_length {self.max_length} must be at least 1")


def prefixes_of(model: str) -> tuple[str, str]:
    """What a model expects before queries and passages, as far as its name tells: that of the E5 family."""
    return ("query: ", "passage: ") if E5.search(model) else ("", "")


class Encoder(Protocol):
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """`[texts, dimension]` float32, rows of length 1."""


def load_encoder(embedding: Embedding, device: str = "cpu") -> Encoder:
    """Raises ConfigError when the model cannot be loaded."""
    if embedding.model == WORDLLAMA:
        return _wordllama(embedding.max_length)
    return TransformersEncoder(embedding, device)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, 1e-12), "float32")


class StaticEncoder:
    """The mean of the vectors of a text's tokens, whatever their order. A text of no tokens is all zeros.

    Args:
        vectors: `[vocabulary, dimension]`.
        tokenizer: of the package tokenizers.
    """

    def __init__(self, vectors: np.ndarray, tokenizer: Any, max_length: int):
        self.vectors, self.tokenizer = vectors.astype("float32"), tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        tokens = [found.ids for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        means = [self.vectors[ids].mean(axis=0) if ids else np.zeros_like(self.vectors[0]) for ids in tokens]
        return unit(np.stack(means))


def _wordllama(max_length: int) -> StaticEncoder:
    """256 dimensions, 32,000 tokens, 16 MB, in the wheel itself.

    Its two files are read here: the package looks for its tokenizer in a folder that it does not have (0.4.0.post1),
    and then downloads it; importing it would also set up the root logger.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise ConfigError("the embedding model wordllama is not installed: pip install 'miles-search-r1[wordllama]'")
    folder = Path(spec.origin).parent
    weights = folder / "weights" / "l2_supercat_256.safetensors"
    tokenizer = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    for path in (weights, tokenizer):
        if not path.is_file():
            raise ConfigError(f"{path} is not there: this release of wordllama is another than those that are known")
    return StaticEncoder(load_file(weights)["embedding.weight"], Tokenizer.from_file(str(tokenizer)), max_length)


class TransformersEncoder:
    """An encoder of transformers; hidden states of its last layer, pooled. Half precision on a GPU."""

    def __init__(self, embedding: Embedding, device: str):
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.embedding, self.device = embedding, device
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(embedding.model, padding_side="right")
            self.model = AutoModel.from_pretrained(embedding.model, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"embedding model {embedding.model!r} cannot be loaded: {error}") from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        given = self.tokenizer(
            list(texts), max_length=self.embedding.max_length, truncation=True, padding=True, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            hidden = self.model(**given).last_hidden_state.float()
        if self.embedding.pooling == "cls":
            return unit(hidden[:, 0].cpu().numpy())
        mask = given["attention_mask"].unsqueeze(-1)
        return unit(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy())
