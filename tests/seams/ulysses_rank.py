"""What the tests of context parallelism run on each rank, and in one process."""

from pathlib import Path

import numpy as np
import torch
from fsdp2_rank import CASES, SHAPE, make_backend, weights
from keeping_step_rank import NOWHERE, failing
from safetensors.torch import save_file
from transformers import Qwen3Config

from miles.builtins.fsdp.memory import OutOfMemoryOnRank
from miles.training.packing import build_micro_batch
from miles.types import LossResult

CASES["one key head"] = (Qwen3Config(**{**SHAPE, "num_key_value_heads": 1}, tie_word_embeddings=False), {}, "actor")
CASES["sliding"] = (
    Qwen3Config(
        **SHAPE, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
    {"gradient_checkpointing": True},
    "actor",
)
MODES = {"dense": "step", "critic": "layer", "moe": "layer", "one key head": "layer", "sliding": "step"}
PLANS = {
    (1, 1): tuple(MODES),
    (2, 2): tuple(MODES),
    (4, 2): ("dense", "moe"),
    (4, 4): ("dense", "critic"),
}
"""Ranks, context_parallel_size -> what is trained. Two key heads on four ranks are repeated, as is one on two."""
RETRIED = {(2, 2): ("forward", "backward", "again"), (4, 2): ("backward",)}
LENGTHS = ((9, 4, 1), (12, 5), (7, 11, 3), ())
"""Samples of each micro-batch; a divisor of 1, 2 and 4 of them, so that data ranks get equally many."""


def make_batches(data_rank: int, data_size: int) -> list:
    """Samples of a micro-batch begin with the same three tokens, where they are that long."""
    generator = np.random.default_rng(2)
    batches = []
    for lengths in LENGTHS:
        prompt = generator.integers(0, 37, 3)
        tokens = [np.concatenate([prompt, generator.integers(0, 37, length)])[:length] for length in lengths]
        masks = [(np.arange(length) >= 3).astype(np.float32) for length in lengths]
        columns = {"weights": [m * generator.random(len(m), dtype=np.float32) / 10 for m in masks], "mask": masks}
        batches.append(build_micro_batch(list(range(len(tokens))), tokens, columns))
    count = len(batches) // data_size
    return batches[data_rank * count : (data_rank + 1) * count]


def loss(batch, outputs):
    weights_T = batch.columns["weights"]
    if outputs.values_T is not None:
        return LossResult(((outputs.values_T - 1) ** 2 * weights_T).sum())
    total = -((outputs.log_probs_T + 0.1 * outputs.entropy_T) * weights_T).sum()
    return LossResult(total, {"loss": total.detach()})


def step(backend, batches):
    wanted = {"values"} if backend.context.role == "critic" else {"log_probs", "entropy"}
    backend.zero_grad()
    sums = backend.forward_backward(batches, loss, frozenset(wanted))
    return backend.optim_step(), {name: float(value) for name, value in sums.items()}


def train(case: str, rank: int, size: int, together: int, folder: Path) -> dict:
    changes = {} if size == 1 else {"context_parallel_size": together, "fsdp_reshard": MODES[case]}
    backend = make_backend(case, rank, size, dtype="fp64", **changes)
    batches = make_batches(backend.data_rank, backend.data_size)
    reports = [step(backend, batches) for _ in range(3)]
    wanted = frozenset({"values"} if backend.context.role == "critic" else {"log_probs", "entropy"})
    scored = backend.forward(batches, wanted)
    trained = weights(backend)
    if rank == 0:
        save_file(trained, folder / f"{case}-{size}-{together}.safetensors")
    return {
        "norms": [report.grad_norm for report, _ in reports],
        "sums": [sums for _, sums in reports],
        "share": [backend.data_rank, backend.data_size],
        "scores": {name: [getattr(o, f"{name}_T").tolist() for o in scored] for name in sorted(wanted)},
        "shared": any(sum(batch.shared) for batch in batches) and backend.shares_prompts,
    }


def out_of_memory(where: str, rank: int, size: int, together: int) -> bool:
    """One rank of one group runs out of memory, and the step is taken again."""
    options = {"context_parallel_size": together, "fsdp_reshard": "layer", "gradient_checkpointing": where == "again"}
    calm, hit = (make_backend("dense", rank, size, **options) for _ in range(2))
    batches = make_batches(hit.data_rank, hit.data_size)
    step(calm, batches)
    place = (where if where != "again" else "forward", 1, 2 if where == "again" else 1)
    with failing(hit, *(place if rank == size - 1 else NOWHERE)):
        try:
            step(hit, batches)
            return False
        except OutOfMemoryOnRank as error:
            blamed = error.rank == size - 1
    step(hit, batches)
    expected = weights(calm)
    return blamed and all(torch.equal(expected[name], tensor) for name, tensor in weights(hit).items())


def run(rank: int, size: int, folder: Path) -> dict:
    """In a process group of that size; of size 1, without."""
    return {
        str(together): {
            "trained": {case: train(case, rank, size, together, folder) for case in cases},
            "retried": {w: out_of_memory(w, rank, size, together) for w in RETRIED.get((size, together), ())},
        }
        for (ranks, together), cases in PLANS.items()
        if ranks == size
    }
