"""A whole job in miniature: a model of 20 thousand parameters, two dozen sums, one optimizer thread. `miniature`
can be imported by every test here."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
_miniature = importlib.util.spec_from_file_location("miniature", Path(__file__).with_name("miniature.py"))
sys.modules["miniature"] = importlib.util.module_from_spec(_miniature)
_miniature.loader.exec_module(sys.modules["miniature"])


from miniature import job, sums_in  # noqa: E402


def load_prepare():
    """The quickstart's data script, for its tokenizer."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", ROOT / "examples/quickstart/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny Qwen3 checkpoint folder with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = load_prepare().build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def sums(tmp_path):
    return sums_in(tmp_path)


@pytest.fixture
def config(checkpoint, sums, tmp_path):
    return job(checkpoint, sums, tmp_path)
