"""Vectors: against numbers worked out with other code."""

import numpy as np
import pytest
import torch
from miles_search_r1.embedding import Embedding, StaticEncoder, load_encoder, prefixes_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from miles.api import ConfigError

WORDS = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "query:", "passage:", "red", "green", "blue"))}


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of random weights, as a folder: what e5-base is, but for its size."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


def by_hand(folder, text, pooling):
    """One text alone, without padding."""
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([[WORDS[word] for word in text.split()]])).last_hidden_state[0]
    vector = (hidden.mean(0) if pooling == "mean" else hidden[0]).numpy()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_of_transformers(bert, pooling):
    texts = ["red", "query: red green blue blue", "blue green"]
    found = load_encoder(Embedding(str(bert), pooling=pooling))(texts)
    assert found.dtype == np.float32
    for vector, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(vector, by_hand(bert, text, pooling), atol=1e-5)


def test_what_exceeds_the_longest_length_is_cut_off(bert):
    encode = load_encoder(Embedding(str(bert), max_length=2))
    np.testing.assert_allclose(encode(["red green blue"]), encode(["red green"]), atol=1e-6)


def test_the_mean_of_static_vectors():
    vectors = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [3, 0], [0, 4], [1, 1]])
    found = StaticEncoder(vectors, word_tokenizer(), 3)(["red", "red green", "red red green blue", ""])
    expected = [[1, 0], [0.6, 0.8], [6 / 52**0.5, 4 / 52**0.5], [0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_wordllama_knows_what_is_alike():
    """It needs no network; paraphrases are nearer than what merely looks alike."""
    encode = load_encoder(Embedding("wordllama"))
    found = encode(["a doctor treats patients", "the physician cures the sick", "a dock trades patience", ""])
    assert found.shape == (4, 256)
    alike = found @ found.T
    assert alike[0, 0] == pytest.approx(1)
    assert alike[0, 1] > alike[0, 2]
    assert not found[3].any()


@pytest.mark.parametrize(
    ("model", "prefixes"),
    [
        ("intfloat/e5-base-v2", ("query: ", "passage: ")),
        ("/models/e5-large", ("query: ", "passage: ")),
        ("intfloat/multilingual-e5-small", ("query: ", "passage: ")),
        ("intfloat/e5-mistral-7b-instruct", ("", "")),
        ("BAAI/bge-base-en-v1.5", ("", "")),
        ("wordllama", ("", "")),
    ],
)
def test_prefixes(model, prefixes):
    assert prefixes_of(model) == prefixes


def test_faults(tmp_path):
    with pytest.raises(ConfigError, match=f"embedding model '{tmp_path}' cannot be loaded"):
        load_encoder(Embedding(str(tmp_path)))
    with pytest.raises(ConfigError, match="pooling 'max'"):
        Embedding("x", pooling="max")
    with pytest.raises(ConfigError, match="max_length 0"):
        Embedding("x", max_length=0)
