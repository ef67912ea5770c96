"""Runs made up, a tokenizer of thirteen tokens, and a browser."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("synthetic.py"))
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)

TOKENS = ["one", "two", "three", "<b>bold</b>", "</script>", "\n", "Ä", "plus", "is", "and", "so", "add", "stop"]


@pytest.fixture(scope="session")
def write_run():
    return synthetic.write_run


@pytest.fixture(scope="session")
def hostile():
    return synthetic.HOSTILE


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="one"))
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, write_run, tokenizer_folder):
    """Two steps and a bit: 1200 samples of 30 tokens that the tokenizer knows."""
    model = {"hf_checkpoint": str(tokenizer_folder)}
    return write_run(tmp_path / "first", 1200, 30, vocabulary=len(TOKENS), model=model)
