"""The bytes behind tokens.

A byte-level token may be a part of a character: its bytes are exact, its text is not. So text is put together from
bytes, a character as soon as it is whole, and log-probabilities name the bytes of each token.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

PROBE = "a é字🧮\n b"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """A tokenizer's tokens as bytes, whichever of the two notations for bytes its pieces are written in."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {token for token, kind in added.items() if kind.special}
        self._added = {token: str(text) for token, text in added.items()}
        self._known: dict[int, bytes] = {}
        pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(PROBE, add_special_tokens=False))
        expected = tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False)).encode()
        self._read: Callable[[str], bytes] | None = None
        self.leading_space = False
        """A sequence's first space is the tokenizer's own, and no text."""
        for read in (_byte_level, _sentencepiece):
            found = b"".join(map(read, pieces))
            if found in (expected, b" " + expected):
                self._read, self.leading_space = read, found != expected
                break

    def bytes_of(self, token: int) -> bytes:
        """What this token stands for; nothing for ids that the tokenizer does not have."""
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if token >= len(self.tokenizer):
            return b""
        if self._read is None:
            return self.tokenizer.decode([token]).encode()
        return self._read(self.tokenizer.convert_ids_to_tokens(token) or "")

    def text_of(self, token: int) -> str:
        """The token by itself, for people: a part of a character is shown as U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")


class TextStream:
    """The text of tokens that come bit by bit. A character that is not whole yet waits for its other bytes."""

    def __init__(self, vocabulary: Vocabulary, special: bool = True):
        """`special`: whether special tokens are written out."""
        self.vocabulary = vocabulary
        self._left_out = frozenset() if special else vocabulary.special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = vocabulary.leading_space

    def feed(self, tokens: Sequence[int]) -> str:
        data = b"".join(self.vocabulary.bytes_of(token) for token in tokens if token not in self._left_out)
        if self._at_start and data:
            data, self._at_start = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def close(self) -> str:
        """What is left: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


@cache
def _bytes_by_character() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as they are, and the others as the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    table = _bytes_by_character()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


def _sentencepiece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
