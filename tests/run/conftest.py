"""A whole job in miniature: a model of 20 thousand parameters, two dozen sums, one optimizer thread."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]


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
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"input": f"{i}+{i}=", "label": str(2 * i)}) + "\n" for i in range(24)))
    return path


def short(sample):
    """Rewards short answers that hold a digit: something that varies between samples."""
    return float(any(c.isdigit() for c in sample.text)) - 0.1 * sample.response_length


@pytest.fixture
def config(checkpoint, sums, tmp_path):
    """Two steps of GRPO with two optimizer steps each."""
    return {
        "run": {"dir": str(tmp_path / "run"), "num_threads": 1, "deterministic": True},
        "model": {"hf_checkpoint": str(checkpoint)},
        "data": {"sets": [{"name": "default", "path": str(sums), "sampling": {"max_new_tokens": 6}, "reward": short}]},
        "rollout": {"num_rollout": 2, "batch_size": 4, "n_samples_per_prompt": 4},
        "algorithm": {"advantage_estimator": "grpo", "policy_loss": "ppo_clip"},
        "train": {"num_steps_per_rollout": 2},
        "optimizer": {"lr": 1e-3},
        "eval": {
            "sets": [
                {
                    "name": "heldout",
                    "path": f"{sums}@[0:8]",
                    "sampling": {"temperature": 0, "max_new_tokens": 6},
                    "reward": short,
                }
            ]
        },
    }
