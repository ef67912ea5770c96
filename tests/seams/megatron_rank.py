"""The ranks of the Megatron spike, in a program of their own: what they change in their processes ends with these.

    python megatron_rank.py FOLDER

For each folder `MODEL-WORLD_SIZE-TENSOR_SIZE-EXPERT_SIZE` in it, one after the other, that many ranks read `checkpoint`
and `tokens.pt` (one list of samples for each data rank), and write what the backend said to `rank-RANK.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked_ranks import fork, wait
from megatron_backend import MegatronBackend, parallel, run_on_cpu
from miles_llama.bridge import LlamaBridge
from miles_qwen.bridge import QwenBridge
from transformers import AutoConfig

from miles.api import BackendContext, MicroBatch, TrainBackend
from miles.config import Config
from miles.types import LossResult, Outputs


def pack(samples: list[list[int]]) -> MicroBatch:
    bounds = [0]
    for sample in samples:
        bounds.append(bounds[-1] + len(sample))
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])
    return MicroBatch(
        torch.tensor([token for sample in samples for token in sample]), positions, bounds, list(range(len(samples)))
    )


def weighted(batch: MicroBatch, outputs: Outputs) -> LossResult:
    """A loss that treats each token differently: `-sum cos(position) * log p`."""
    loss = -(torch.cos(batch.positions_T.float()) * outputs.log_probs_T).sum()
    return LossResult(loss, {"loss": loss.detach()})


def one_rank(folder: Path, rank: int, world_size: int, tensor_size: int, expert_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    run_on_cpu()
    parallel(tensor_size, expert_size)
    hf_config = AutoConfig.from_pretrained(folder / "checkpoint")
    bridge = LlamaBridge() if hf_config.model_type == "llama" else QwenBridge()
    context = BackendContext(
        config=Config.model_validate({"optimizer": {"lr": 1e-3, "clip_grad": 0.0}}),
        role="actor",
        checkpoint=folder / "checkpoint",
        hf_config=hf_config,
        bridge=bridge,
        precision=None,
        transforms=(),
        rank=rank,
        world_size=world_size,
        device="cpu",
        total_steps=1,
        temperature=0.7,
    )
    backend = MegatronBackend(context=context)
    assert isinstance(backend, TrainBackend)
    samples = torch.load(folder / "tokens.pt")[backend.data_rank]

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for group in backend.named_weights() for name, tensor in group.items()}

    said = {"data_rank": backend.data_rank, "data_size": backend.data_size, "before": weights()}
    (outputs,) = backend.forward([pack(samples)], frozenset({"log_probs", "entropy", "logits"}))
    said |= {"log_probs": outputs.log_probs_T, "entropy": outputs.entropy_T, "logits": outputs.logits(0, 3)}
    backend.save(folder / "saved")
    backend.zero_grad()
    said["sums"] = backend.forward_backward([pack([sample]) for sample in samples], weighted)
    said["grad_norm"] = backend.optim_step().grad_norm
    said["after"] = weights()
    backend.load(folder / "saved")
    backend.offload(frozenset({"parameters", "gradients", "optimizer"}))
    backend.onload(frozenset({"parameters", "gradients", "optimizer"}))
    said["restored"] = weights()
    torch.save(said, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        sizes = [int(size) for size in folder.name.split("-")[1:]]
        wait([fork(one_rank, folder, rank, *sizes) for rank in range(sizes[0])])
