"""The ranks of the seam test: they train tiny models and write what they ended with to a folder.

    python fsdp2_rank.py FOLDER CASE ...

Groups of 1, 2 and 4 ranks train, side by side; then each group reads what the others saved. In a group of 1 the model
is a plain module and sees the samples of all ranks. The ranks are forks of one process, which imports for all of them.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from forked_ranks import fork, join, wait
from miles_qwen.bridge import QwenBridge
from safetensors.torch import save_file
from torch._C._distributed_c10d import _get_work_registry_size
from transformers import Qwen3Config, Qwen3MoeConfig

from miles.builtins.fsdp.backend import FsdpBackend
from miles.builtins.fsdp.model import local, whole
from miles.config import Config
from miles.protocols import BackendContext
from miles.training.packing import build_micro_batch
from miles.types import LossResult

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}
EXACT = ("exact", "exact-bf16", "exact-grouped", "exact-moe")
CASES = {
    "dense": (Qwen3Config(**SHAPE, tie_word_embeddings=True), {"fsdp_reshard": "layer"}, "actor"),
    "moe": (
        Qwen3MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
        {"gradient_checkpointing": True, "fsdp_reshard": "layer"},
        "actor",
    ),
    "bf16": (Qwen3Config(**SHAPE, tie_word_embeddings=False), {"dtype": "bf16", "fsdp_reshard": "step"}, "actor"),
    "critic": (Qwen3Config(**SHAPE, tie_word_embeddings=True), {"fsdp_reshard": "step"}, "critic"),
    "grouped": (
        Qwen3Config(**{**SHAPE, "num_hidden_layers": 8}),
        {"gradient_checkpointing": True, "fsdp_reshard": "layer"},
        "actor",
    ),
    "grouped by step": (Qwen3Config(**{**SHAPE, "num_hidden_layers": 8}), {"fsdp_reshard": "step"}, "actor"),
    "exact": (Qwen3Config(**SHAPE, tie_word_embeddings=True), {"fsdp_reshard": "layer"}, "actor"),
    "exact-bf16": (Qwen3Config(**SHAPE), {"dtype": "bf16"}, "actor"),
    "exact-grouped": (Qwen3Config(**{**SHAPE, "num_hidden_layers": 8}), {}, "actor"),
    "exact-moe": (Qwen3MoeConfig(**SHAPE, **EXPERTS), {}, "critic"),
}
SIZES = (1, 2, 4)
PLAN = [[0, 1], [2], [3], [4, 5]]
"""Micro-batches -> samples; each rank takes its part of them."""
LONG_PLAN = [*PLAN, [5], [1, 3], [2, 0], [4]]


def make_backend(case: str, rank: int, size: int, **changes) -> FsdpBackend:
    hf_config, train, role = CASES[case]
    if case in EXACT:
        train = {**train, "reproducible_ranks": 4}
    config = Config.model_validate(
        {
            "model": {"random_init": True},
            "train": {"log_probs_chunk_size": 7, **train, **changes},
            "optimizer": {"lr": 2e-3, "lr_schedule": "linear", "weight_decay": 0.1, "clip_grad": 0.5},
        }
    )
    return FsdpBackend(
        context=BackendContext(
            config=config,
            role=role,
            checkpoint=Path("unused"),
            hf_config=hf_config,
            bridge=QwenBridge(),
            precision=None,
            transforms=(),
            rank=rank,
            world_size=size,
            device="cpu",
            total_steps=8,
        )
    )


def make_batches(rank: int, size: int, plan=PLAN):
    generator = np.random.default_rng(1)
    samples = [generator.integers(0, 37, length) for length in (9, 4, 12, 5, 7, 11)]
    columns = {"weights": [generator.random(len(s), dtype=np.float32) / 10 for s in samples]}
    count = len(plan) // size
    return [build_micro_batch(rows, samples, columns) for rows in plan[rank * count : (rank + 1) * count]]


def loss(batch, outputs):
    if outputs.values_T is not None:
        return LossResult(((outputs.values_T - 1) ** 2 * batch.columns["weights"]).sum())
    return LossResult(-(outputs.log_probs_T * batch.columns["weights"]).sum())


def step(backend, batches):
    wanted = frozenset({"values" if backend.context.role == "critic" else "log_probs"})
    backend.zero_grad()
    sums = backend.forward_backward(batches, loss, wanted)
    return backend.optim_step(), sums


def weights(backend) -> dict[str, torch.Tensor]:
    found = {name: tensor.clone() for group in backend.named_weights() for name, tensor in group.items()}
    if backend.scorer.value_head is not None:
        found["value_head"] = whole_value_head(backend)
    return found


def whole_value_head(backend) -> torch.Tensor:
    return whole(backend.scorer.value_head.weight.detach()).clone()


def whole_state(backend) -> dict[str, torch.Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in backend._state().items()}


def run(case: str, rank: int, size: int, folder: Path) -> dict:
    backend, batches = make_backend(case, rank, size), make_batches(rank, size, LONG_PLAN if case in EXACT else PLAN)
    reports = [step(backend, batches) for _ in range(5 if case in EXACT else 3)]
    trained = weights(backend)
    backend.save(folder / f"{case}-state-{size}")
    state = whole_state(backend)
    if rank == 0:
        save_file(trained, folder / f"{case}-{size}.safetensors")
        torch.save(state, folder / f"{case}-{size}.pt")
    wanted = frozenset(
        {"values", "log_probs", "entropy", "logits"} if backend.context.role == "critic" else {"log_probs"}
    )
    scored = backend.forward(batches, wanted)
    facts = {
        "norms": [report.grad_norm for report, _ in reports],
        "aux": sum(float(sums.get("train/router_balance", 0.0)) for _, sums in reports),
        "scores": [float(outputs.log_probs_T.sum()) for outputs in scored],
        "under_way": max(_get_work_registry_size() for _ in backend.named_weights()),
    }
    if size == 2 and case not in EXACT:
        facts |= after_training(backend, batches, trained, folder / f"{case}-state-2")
    return facts


def read(case: str, rank: int, size: int, folder: Path) -> dict:
    """Whether the state that each group saved is what a group of this size loads, bit for bit."""
    backend = make_backend(case, rank, size)
    facts = {}
    for saver in SIZES:
        backend.load(folder / f"{case}-state-{saver}")
        expected = torch.load(folder / f"{case}-{saver}.pt", weights_only=True)
        facts[f"reads_{saver}"] = same(whole_state(backend), expected)
    return facts


def after_training(backend, batches, trained, state: Path) -> dict:
    """What must hold on sharded weights as on whole ones: resuming, offloading, skipping, retrying."""
    step(backend, batches)
    once = weights(backend)
    backend.load(state)
    restored = weights(backend)
    everything = frozenset({"parameters", "gradients", "optimizer"})
    backend.presence.moves = True  # as on CUDA
    backend.offload(everything)
    left = {name for name, tensor in backend._state().items() if local(tensor.detach()).untyped_storage().nbytes()}
    backend.onload(everything)
    step(backend, batches)
    again = weights(backend)
    skipped = step(backend, [spoiled(batches[0], backend.data_rank), *batches[1:]])[0].skipped
    after_skip = weights(backend)
    backend.load(state)
    retried = out_of_memory_then_step(backend, batches)
    return {
        "restored": same(restored, trained),
        "moved_on": not same(once, trained),
        "parked": left == {"steps"},
        "resumed": same(once, again),
        "skipped": skipped and same(again, after_skip),
        "retried": same(retried, once),
        "empty": empty_on_rank_one(backend, batches),
    }


def spoiled(batch, rank: int):
    """A loss that is not a number, on one rank only."""
    poison = torch.full_like(batch.columns["weights"], float("nan") if rank == 1 else 1.0)
    return replace(batch, columns=batch.columns | {"weights": batch.columns["weights"] * poison})


def out_of_memory_then_step(backend, batches) -> dict[str, torch.Tensor]:
    """The last layer runs out of memory on the second micro-batch, when the first has left its gradients."""
    layer = backend.scorer.lm.model.layers[-1].mlp
    seen = []

    def fail_on_second(module, args):
        seen.append(module)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("injected")

    hook = layer.register_forward_pre_hook(fail_on_second)
    try:
        step(backend, batches)
    except torch.OutOfMemoryError:
        hook.remove()
        step(backend, batches)
    return weights(backend)


def empty_on_rank_one(backend, batches) -> bool:
    """Ranks keep step when one has nothing to do."""
    mine = batches[:1] if backend.data_rank == 0 else [build_micro_batch([], [], {"weights": []})]
    return not step(backend, mine)[0].skipped


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_rank(work, rank: int, size: int, folder: Path, cases: list[str]) -> None:
    if size > 1:
        join(rank, size, folder / f"{work.__name__}-{size}")
    facts = {case: work(case, rank, size, folder) for case in cases if work is run or case not in EXACT}
    (folder / f"{work.__name__}-{rank}-of-{size}.json").write_text(json.dumps(facts))
    if size > 1:
        dist.barrier()


if __name__ == "__main__":
    for work in (run, read):
        own = (Path(sys.argv[1]), sys.argv[2:])
        wait([fork(one_rank, work, rank, size, *own) for size in SIZES for rank in range(size)])
