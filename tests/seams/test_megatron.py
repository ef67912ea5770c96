"""Seam: Megatron-Core behind the train-backend protocol and a bridge, equal to transformers, on one and two ranks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("megatron"), reason="needs megatron-core, which requirements-dev.txt installs"),
]

DENSE = {
    "vocab_size": 41,  # padded to 48 rows
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
MODELS = {
    "qwen3": Qwen3Config(**DENSE, head_dim=16),
    "qwen3_tied": Qwen3Config(**DENSE, head_dim=16, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**DENSE),
    "llama": LlamaConfig(**DENSE),
    "qwen3_moe": Qwen3MoeConfig(**MOE, head_dim=16, norm_topk_prob=True),
    "qwen2_moe": Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=24),
}
LAYOUTS = [(name, 1, 1, 1) for name in ("qwen3", "llama", "qwen3_moe", "qwen2_moe")]
LAYOUTS += [("qwen3_tied", 2, 2, 1), ("qwen2", 2, 2, 1), ("qwen3_moe", 2, 1, 2)]
"""Model, ranks, how many split a matrix, how many the experts."""
SAMPLES = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4, 6, 2, 6]]
TEMPERATURE = 0.7


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3)
    return model


def expected(model) -> dict:
    """The same by transformers, a sample at a time."""
    log_probs, entropy, logits = [], [], []
    for sample in SAMPLES:
        log_p = (model(torch.tensor([sample])).logits[0] / TEMPERATURE).log_softmax(-1)
        chosen = log_p[:-1].gather(-1, torch.tensor(sample[1:])[:, None])[:, 0]
        log_probs.append(torch.cat([torch.zeros(1), chosen]))
        entropy.append(torch.cat([torch.zeros(1), -(log_p.exp() * log_p).sum(-1)[:-1]]))
        logits.append(log_p)
    model.zero_grad()
    loss = -sum((torch.cos(torch.arange(len(t)).float()) * t).sum() for t in log_probs)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {"log_probs": log_probs, "entropy": entropy, "logits": logits, "loss": loss.detach(), "grad_norm": norm}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks) -> Path:
    """What the ranks of every layout wrote, each layout in a folder of its own."""
    folder = tmp_path_factory.mktemp("megatron")
    for name, ranks, tensor_size, expert_size in LAYOUTS:
        own, share = folder / f"{name}-{ranks}-{tensor_size}-{expert_size}", len(SAMPLES) * tensor_size // ranks
        random_model(MODELS[name]).save_pretrained(own / "checkpoint")
        torch.save([SAMPLES[i : i + share] for i in range(0, len(SAMPLES), share)], own / "tokens.pt")
    run_ranks("megatron_rank.py", str(folder))
    return folder


@pytest.mark.parametrize(("name", "ranks", "tensor_size", "expert_size"), LAYOUTS)
def test_megatron_equals_transformers(folder, name, ranks, tensor_size, expert_size):
    own = folder / f"{name}-{ranks}-{tensor_size}-{expert_size}"
    said = [torch.load(own / f"rank-{rank}.pt") for rank in range(ranks)]
    wanted = expected(random_model(MODELS[name]))
    share = len(SAMPLES) * tensor_size // ranks
    checkpoint = load_file(own / "checkpoint" / "model.safetensors")
    for rank in said:
        mine = slice(rank["data_rank"] * share, (rank["data_rank"] + 1) * share)
        for quantity in ("log_probs", "entropy"):
            torch.testing.assert_close(rank[quantity], torch.cat(wanted[quantity][mine]), rtol=0, atol=1e-5)
        first = wanted["logits"][mine.start]
        torch.testing.assert_close(rank["logits"][1:3].log_softmax(-1), first[:2], rtol=0, atol=1e-5)
        assert rank["grad_norm"] == pytest.approx(float(wanted["grad_norm"]), rel=1e-5)
        assert same(rank["before"], checkpoint)
        assert same(rank["restored"], checkpoint)
        assert not any(torch.equal(rank["after"][n], t) for n, t in checkpoint.items() if t.ndim == 2)
    losses = {rank["data_rank"]: rank["sums"]["loss"] for rank in said}
    assert float(sum(losses.values())) == pytest.approx(float(wanted["loss"]), rel=1e-5)
