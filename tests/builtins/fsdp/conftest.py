"""Tiny models, built from their configs, behind the backend `fsdp`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from miles.builtins.fsdp.backend import FsdpBackend
from miles.config import Config
from miles.protocols import BackendContext
from miles.training.packing import build_micro_batch
from miles.types import LossResult, MicroBatch, Outputs

VOCAB = 37
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


class SameNames:
    """A bridge for a family whose checkpoints are named as the module is."""

    def to_world(self, world, hf_config, groups, part=None):
        return iter(groups)

    def from_world(self, world, hf_config, groups, part=None):
        return iter(groups)

    def sharding(self, hf_config, name):
        return None

    def config_for(self, world, hf_config):
        return {}


@pytest.fixture
def dense() -> Callable[..., PretrainedConfig]:
    return lambda **changes: Qwen3Config(**{**COMMON, **changes})


@pytest.fixture
def moe() -> Callable[..., PretrainedConfig]:
    return lambda **changes: Qwen3MoeConfig(**{**COMMON, **MOE, **changes})


@pytest.fixture
def make_backend(dense) -> Callable[..., FsdpBackend]:
    """`make_backend(hf_config, role=..., train={...}, optimizer={...})`, weights drawn from a seed."""

    def make(
        hf_config=None, *, role="actor", train=None, optimizer=None, temperature=1.0, random_init=True, **context
    ) -> FsdpBackend:
        config = Config.model_validate(
            {
                "model": {"random_init": random_init},
                "run": {"seed": 3},
                "train": train or {},
                "optimizer": {"lr": 1e-2, **(optimizer or {})},
            }
        )
        given = {
            "checkpoint": Path("unused"),
            "bridge": SameNames(),
            "precision": None,
            "transforms": (),
            "rank": 0,
            "world_size": 1,
            "device": "cpu",
            "total_steps": 10,
            **context,
        }
        hf_config = dense() if hf_config is None else hf_config
        return FsdpBackend(
            context=BackendContext(config=config, role=role, hf_config=hf_config, temperature=temperature, **given)
        )

    return make


@pytest.fixture
def samples() -> list[np.ndarray]:
    """Seven samples of unequal length; one has a single token."""
    generator = np.random.default_rng(5)
    return [generator.integers(0, VOCAB, length) for length in (9, 4, 12, 1, 9, 7, 12)]


def pack(samples, rows=None) -> MicroBatch:
    """A micro-batch with weights that differ by token, as the trainer would hand out."""
    weights = [np.linspace(0.5, 1.5, len(s), dtype=np.float32) / (i + 1) for i, s in enumerate(samples)]
    rows = list(range(len(samples))) if rows is None else rows
    return build_micro_batch(rows, samples, {"weights": weights})


def weighted(batch: MicroBatch, outputs: Outputs) -> LossResult:
    """A loss that is a weighted sum over tokens, so that it does not care how they are batched."""
    loss = -(outputs.log_probs_T * batch.columns["weights"]).sum()
    return LossResult(loss, {"loss": loss.detach()})


def gradients(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in backend.scorer.named_parameters() if p.grad is not None}


@pytest.fixture(name="pack")
def pack_fixture():
    return pack


@pytest.fixture(name="weighted")
def weighted_fixture():
    return weighted


@pytest.fixture(name="gradients")
def gradients_fixture():
    return gradients


@pytest.fixture
def step():
    """`step(backend, micro-batch, loss)`: one optimizer step."""

    def take(backend: FsdpBackend, batch: MicroBatch, loss):
        backend.zero_grad()
        backend.forward_backward([batch], loss)
        return backend.optim_step()

    return take


@pytest.fixture
def tensors():
    """`tensors(backend)`: a copy of its state."""
    return lambda backend: {name: tensor.detach().clone() for name, tensor in backend._state().items()}


@pytest.fixture
def same():
    """`same(tensors, tensors)`: bit for bit."""
    return lambda a, b: a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
