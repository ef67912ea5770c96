"""An index of a corpus: vectors in FAISS, on disk with all that is needed to search it rightly.

    index.json       what it was made of: corpus, embedding model, kind; written last, so that half an index is none
    index.faiss      the vectors
    offsets.npy      where the corpus' lines begin

The corpus stays where it is, and must stay what it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from miles.api import ConfigError, DataError
from miles_search_r1.corpus import Corpus, fingerprint, open_corpus
from miles_search_r1.embedding import Embedding, Encoder, load_encoder

FORMAT = 1
SAME = 0.99
"""Cosine of the first passage's vector with the recorded one, below which the embedding model is another one. Half
precision stays above it."""


@dataclass(frozen=True)
class Building:
    """How an index is made."""

    kind: str = "Flat"
    """A string of FAISS' index factory: `Flat` (exact), `HNSW32`, `IVF4096,Flat`, `IVF4096,SQ8`, `IVF65536,PQ64` ..."""
    batch_size: int = 256
    """Passages that are embedded at once."""
    train_size: int = 200_000
    """Passages, spread over the corpus, by which kinds with clusters or codes find theirs."""
    device: str = "cpu"
    """Where the embedding model runs."""


class Index:
    """A corpus that can be searched. One thread at a time."""

    def __init__(self, corpus: Corpus, vectors: Any, embedding: Embedding, encode: Encoder):
        self.corpus, self.vectors, self.embedding, self.encode = corpus, vectors, embedding, encode

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: Sequence[str], topk: int) -> list[list[tuple[float, dict[str, Any]]]]:
        """For each query the `topk` nearest passages, best first: (cosine, row of the corpus)."""
        vectors = self.encode([self.embedding.query_prefix + query for query in queries])
        scores, numbers = self.vectors.search(vectors, topk)
        return [
            [(float(score), self.corpus[int(number)]) for score, number in zip(*pair, strict=True) if number >= 0]
            for pair in zip(scores, numbers, strict=True)
        ]


def build_index(
    path: Path, out: Path, embedding: Embedding, how: Building, say: Callable[[int, int], None] = lambda done, of: None
) -> Index:
    """Embed every passage of the corpus `path` and write the index to the folder `out`.

    Args:
        say: told now and then how many passages are done, of how many.

    Raises:
        DataError: the corpus cannot be read.
        ConfigError: there is an index in `out`, or FAISS does not know the kind, or there are too few passages for it.
    """
    if (out / "index.json").exists():
        raise ConfigError(f"{out} holds an index already; name another folder, or remove it")
    corpus, encode = open_corpus(path), load_encoder(embedding, how.device)
    first = encode([embedding.passage_prefix + corpus.text(0)])
    vectors = _empty(first.shape[1], how)
    if not vectors.is_trained:
        chosen = np.linspace(0, len(corpus) - 1, min(len(corpus), how.train_size)).astype(int).tolist()
        texts = [embedding.passage_prefix + corpus.text(number) for number in chosen]
        parts = [encode(texts[start : start + how.batch_size]) for start in range(0, len(texts), how.batch_size)]
        _trained(vectors, np.concatenate(parts), how)
    for texts in corpus.batches(how.batch_size):
        vectors.add(encode([embedding.passage_prefix + text for text in texts]))
        say(vectors.ntotal, len(corpus))
    out.mkdir(parents=True, exist_ok=True)
    _faiss().write_index(vectors, str(out / "index.faiss"))
    np.save(out / "offsets.npy", corpus.offsets)
    made_of = {
        "format": FORMAT,
        "kind": how.kind,
        "passages": len(corpus),
        "dimension": int(first.shape[1]),
        "embedding": asdict(embedding),
        "corpus": {"path": str(path.absolute()), "fingerprint": fingerprint(path)},
        "first": [round(float(value), 6) for value in first[0]],
    }
    (out / "index.json").write_text(json.dumps(made_of, indent=1), encoding="utf-8")
    return Index(corpus, vectors, embedding, encode)


def load_index(
    folder: Path, *, corpus: Path | None = None, device: str = "cpu", memory_map: bool = False, parameters: str = ""
) -> Index:
    """The index in a folder, checked against its corpus and its embedding model.

    Args:
        corpus: where the corpus is now, if it was moved.
        memory_map: leave vectors on disk and read what a search needs.
        parameters: of the search, as FAISS spells them: `nprobe=32`, `efSearch=64`.

    Raises:
        DataError: there is no whole index, or corpus or embedding model are not those it was made of.
        ConfigError: a parameter that this kind of index does not have.
    """
    if not (folder / "index.json").is_file():
        raise DataError(f"{folder}: no index.json, so no index that is whole; `miles search index` makes one")
    made_of = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if made_of.get("format") != FORMAT:
        raise DataError(
            f"{folder}: an index of format {made_of.get('format')}, this version reads {FORMAT}; make it anew"
        )
    vectors = _read_vectors(folder / "index.faiss", made_of["kind"], memory_map)
    passages = _corpus_of(folder, made_of, corpus)
    if not vectors.ntotal == len(passages) == made_of["passages"]:
        raise DataError(
            f"{folder}: {vectors.ntotal} vectors, {len(passages)} lines and {made_of['passages']} passages recorded "
            "should be one number: its files are not of one index. Make it anew"
        )
    embedding = Embedding(**made_of["embedding"])
    encode = load_encoder(embedding, device)
    _check_model(folder, embedding, encode([embedding.passage_prefix + passages.text(0)])[0], made_of["first"])
    if parameters:
        try:
            _faiss().ParameterSpace().set_index_parameters(vectors, parameters)
        except RuntimeError as error:
            raise ConfigError(
                f"search parameters {parameters!r} for an index of kind {made_of['kind']}: {error}"
            ) from error
    return Index(passages, vectors, embedding, encode)


def _corpus_of(folder: Path, made_of: Mapping[str, Any], moved: Path | None) -> Corpus:
    path = moved or Path(made_of["corpus"]["path"])
    if not path.is_file():
        raise DataError(f"{folder}: its corpus {path} is not there; say where it is with --corpus")
    if fingerprint(path) != made_of["corpus"]["fingerprint"]:
        raise DataError(
            f"{folder}: {path} is not the corpus that it was made of (or has changed since): its passages would not be "
            "those that the vectors belong to. Make the index anew, or name the right file with --corpus"
        )
    return Corpus(path, np.load(folder / "offsets.npy", mmap_mode="r"))


def _check_model(folder: Path, embedding: Embedding, now: np.ndarray, then: Sequence[float]) -> None:
    if len(now) != len(then) or float(now @ np.array(then)) < SAME:
        raise DataError(
            f"{folder}: the embedding model {embedding.model!r} gives the first passage another vector than "
            "it did when the index was made: its weights are others now. Make the index anew"
        )


def _read_vectors(path: Path, kind: str, memory_map: bool) -> Any:
    faiss = _faiss()
    mapped = faiss.IO_FLAG_MMAP if "IVF" in kind else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), mapped if memory_map else 0)
    except RuntimeError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _empty(dimension: int, how: Building) -> Any:
    faiss = _faiss()
    try:
        return faiss.index_factory(dimension, how.kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"kind {how.kind!r} for vectors of {dimension} numbers: FAISS: {error}") from error


def _trained(vectors: Any, sample: np.ndarray, how: Building) -> None:
    try:
        vectors.train(sample)
    except RuntimeError as error:
        raise ConfigError(f"kind {how.kind!r} cannot be trained on {len(sample)} passages: FAISS: {error}") from error


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"FAISS is not installed ({error}): pip install 'miles-search-r1[server]'") from error
    return faiss
