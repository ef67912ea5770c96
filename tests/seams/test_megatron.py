"""Seam: Megatron-Core behind the train-backend protocol and a bridge, equal to transformers, on one and two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
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
SAMPLES = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4, 6, 2, 6]]
TEMPERATURE = 0.7


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3)
    return model


def run_ranks(folder: Path, ranks: int, tensor_size: int, expert_size: int, data_size: int) -> list[dict]:
    """Every rank in a process of its own; what each wrote."""
    share = len(SAMPLES) // data_size
    torch.save([SAMPLES[i * share : (i + 1) * share] for i in range(data_size)], folder / "tokens.pt")
    program = Path(__file__).with_name("megatron_rank.py")
    command = [sys.executable, str(program), str(folder)]
    sizes = [str(ranks), str(tensor_size), str(expert_size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(
            [*command, str(rank), *sizes], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(ranks)
    ]
    try:
        for rank, process in enumerate(running):
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)]


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


LAYOUTS = [(name, 1, 1, 1) for name in ("qwen3", "llama", "qwen3_moe", "qwen2_moe")]
LAYOUTS += [("qwen3_tied", 2, 2, 1), ("qwen2", 2, 2, 1), ("qwen3_moe", 2, 1, 2)]


@pytest.mark.parametrize(("name", "ranks", "tensor_size", "expert_size"), LAYOUTS)
def test_megatron_equals_transformers(name, ranks, tensor_size, expert_size, tmp_path):
    model = random_model(MODELS[name])
    model.save_pretrained(tmp_path / "checkpoint")
    data_size = ranks // tensor_size
    said = run_ranks(tmp_path, ranks, tensor_size, expert_size, data_size)
    wanted = expected(model)
    share = len(SAMPLES) // data_size
    checkpoint = load_file(tmp_path / "checkpoint" / "model.safetensors")
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
