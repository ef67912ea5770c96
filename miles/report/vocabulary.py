"""What tokens say: the text of each token id that occurs, by the run's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles.report.runs import RunRecord

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(run: RunRecord) -> Any:
    """The tokenizer of a run's model, from this machine alone; its own code, if it has any, is never run.

    Raises:
        FileNotFoundError: it is not here.
        Exception: whatever transformers and a tokenizer's files make of each other.
    """
    from transformers import AutoTokenizer

    model = run.config.get("model", {})
    folder = find_folder(run)
    if folder is not None:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    name, revision = model.get("hf_checkpoint"), model.get("revision")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(f"{name} is neither a folder here nor in the cache of the Hugging Face hub") from error


def find_folder(run: RunRecord) -> Path | None:
    """The checkpoint folder, when the name means one: from here, or from where the run was started."""
    named = Path(str(run.config.get("model", {}).get("hf_checkpoint")))
    own = Path(str(run.config.get("run", {}).get("dir", "")))
    here, places = run.directory.resolve(), [Path.cwd()]
    if not own.is_absolute() and own.parts and here.parts[-len(own.parts) :] == own.parts:
        places.append(here.parents[len(own.parts) - 1])
    return next((place / named for place in places if (place / named).is_dir()), None)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself. Part of a character is shown as its bytes, `\\xe2\\x82`."""
    size = len(tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(i) if 0 <= i < size else None for i in ids]
    texts = []
    for i, piece in zip(ids, pieces, strict=True):
        if not isinstance(piece, str):
            texts.append(f"<{i}>")
            continue
        text = tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if UNKNOWN in text:
            text = _as_bytes(piece)
        elif piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        texts.append(text)
    return texts


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: printable Latin-1 ones stand for themselves, the others for
    the code points from 256 on, in order (as in GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(rest)}


BYTES = _byte_alphabet()


def _as_bytes(piece: str) -> str:
    if all(character in BYTES for character in piece):
        return "".join(f"\\x{BYTES[character]:02x}" for character in piece)
    return piece
