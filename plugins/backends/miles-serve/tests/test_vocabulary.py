"""The bytes behind tokens, and text that is put together from them, against the tokenizers' own decoding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miles_serve.vocabulary import TextStream, Vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles.testing import tiny

BYTE_LEVEL = tiny.tokenizer()
SIZE = len(BYTE_LEVEL)


def sentencepiece():
    """Pieces with a mark for spaces, and bytes as pieces of their own, as Llama 2 has them."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def read(vocabulary, tokens, cuts=(), special=True):
    stream = TextStream(vocabulary, special)
    ends = sorted(cut % (len(tokens) + 1) for cut in cuts)
    pieces = [tokens[start:end] for start, end in zip([0, *ends], [*ends, len(tokens)], strict=True)]
    return "".join(stream.feed(piece) for piece in pieces) + stream.close()


def test_bytes_of_a_token():
    vocabulary = Vocabulary(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode("hello é<think>\n\n", add_special_tokens=False)
    expected = [b"hello", b" ", b"\xc3", b"\xa9", b"<think>", b"\n\n"]
    assert [vocabulary.bytes_of(token) for token in ids] == expected
    assert vocabulary.text_of(ids[2]) == "\ufffd"
    assert vocabulary.bytes_of(SIZE + 5) == b""


@given(st.lists(st.integers(0, SIZE - 1)), st.lists(st.integers(0, 50), max_size=5))
def test_text_in_pieces_is_the_tokenizers_text(tokens, cuts):
    vocabulary = Vocabulary(BYTE_LEVEL)
    expected = BYTE_LEVEL.decode(tokens, clean_up_tokenization_spaces=False)
    assert read(vocabulary, tokens, cuts) == expected
    unmarked = BYTE_LEVEL.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert read(vocabulary, tokens, cuts, special=False) == unmarked


def test_special_tokens_can_be_left_out():
    tokens = BYTE_LEVEL.encode(f"a{tiny.TURN_BEGIN}<think>b{tiny.END_OF_TEXT}", add_special_tokens=False)
    assert read(Vocabulary(BYTE_LEVEL), tokens, special=False) == "a<think>b"


def test_a_character_waits_until_it_is_whole():
    stream = TextStream(Vocabulary(BYTE_LEVEL))
    first, second = BYTE_LEVEL.encode("é", add_special_tokens=False)
    assert (stream.feed([first]), stream.feed([second]), stream.close()) == ("", "é", "")
    stream.feed([first])
    assert stream.close() == "\ufffd"


@pytest.mark.parametrize("text", ["a b", "é字 a", "aa\n  b🧮"])
def test_sentencepiece_pieces(text):
    tokenizer = sentencepiece()
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    for cut in range(len(tokens)):
        assert read(vocabulary, tokens, [cut]) == text
    assert vocabulary.bytes_of(tokenizer.convert_tokens_to_ids("<0x0A>")) == b"\n"
    assert vocabulary.bytes_of(tokenizer.convert_tokens_to_ids("▁a")) == b" a"


def test_a_tokenizer_of_another_kind_is_asked_for_the_text_of_each_token():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    )
    assert Vocabulary(tokenizer).bytes_of(1) == b"hello"
