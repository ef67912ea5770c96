"""One training step on groups that share a long prompt, at the shape of Qwen3-0.6B: the prompt computed once, or not.

    python scripts/gpu/shared_prompt.py [--groups 2 --samples 8 --prompt 2048 --response 256] [--attention sdpa flex]

Forward and backward of the backend `fsdp` in bf16, rounds interleaved, medians; and how far log-probabilities and the
gradient norm of the two ways differ. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from miles_qwen.bridge import QwenBridge
from transformers import Qwen3Config

from miles.api import BackendContext, LossResult
from miles.builtins.fsdp.backend import FsdpBackend
from miles.config import Config
from miles.toolkit import build_micro_batch

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151_936},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 512},
}


def make_backend(shape: str, attention: str, device: str) -> FsdpBackend:
    size = SHAPES[shape]
    heads = {"num_attention_heads": size["hidden_size"] // 64, "num_key_value_heads": size["hidden_size"] // 128}
    hf_config = Qwen3Config(**size, **heads, head_dim=128, tie_word_embeddings=True, initializer_range=0.05)
    config = Config.model_validate(
        {
            "model": {"random_init": True},
            "train": {"dtype": "bf16", "attention": attention, "gradient_checkpointing": True},
        }
    )
    context = BackendContext(
        config=config,
        role="actor",
        checkpoint=Path("unused"),
        hf_config=hf_config,
        bridge=QwenBridge(),
        precision=None,
        transforms=(),
        rank=0,
        world_size=1,
        device=device,
        total_steps=10,
        temperature=1.0,
    )
    return FsdpBackend(context=context)


def make_batch(given: argparse.Namespace, device: str):
    draw = np.random.default_rng(0)
    vocabulary = SHAPES[given.shape]["vocab_size"]
    samples, masks = [], []
    for _ in range(given.groups):
        prompt = draw.integers(0, vocabulary, given.prompt)
        for _ in range(given.samples):
            samples.append(np.concatenate([prompt, draw.integers(0, vocabulary, given.response)]))
            masks.append(np.r_[np.zeros(given.prompt), np.ones(given.response)].astype(np.float32))
    return build_micro_batch(list(range(len(samples))), samples, {"mask": masks}, device=device)


def loss(batch, outputs):
    total = -(outputs.log_probs_T * batch.columns["mask"]).sum() / batch.columns["mask"].sum()
    return LossResult(total, {"loss": total.detach()})


def measure(given: argparse.Namespace, attention: str, device: str) -> dict:
    backend, batch = make_backend(given.shape, attention, device), make_batch(given, device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    log_probs, norms = {}, {}
    for round in range(given.rounds + 2):
        for shares in (True, False):
            backend.shares_prompts = shares
            backend.zero_grad()
            _wait(device)
            started = time.perf_counter()
            backend.forward_backward([batch], loss)
            _wait(device)
            if round >= 2:
                seconds[shares].append(time.perf_counter() - started)
            norms[shares] = float(torch.nn.utils.get_total_norm([m.grad for m in backend.optimizer.masters.values()]))
    for shares in (True, False):
        backend.shares_prompts = shares
        (outputs,) = backend.forward([batch], frozenset({"log_probs"}))
        log_probs[shares] = outputs.log_probs_T
    difference = (log_probs[True] - log_probs[False]).abs()
    return {
        "attention": attention,
        "seconds_shared": round_to(median(seconds[True])),
        "seconds_whole": round_to(median(seconds[False])),
        "ratio": round_to(median(seconds[False]) / median(seconds[True])),
        "log_prob_difference_mean": float(difference.mean()),
        "log_prob_difference_max": float(difference.max()),
        "grad_norm_shared": norms[True],
        "grad_norm_whole": norms[False],
    }


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", choices=SHAPES)
    for name, default in (("groups", 2), ("samples", 8), ("prompt", 2048), ("response", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--attention", nargs="+", default=["sdpa", "flex"])
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = [measure(given, attention, device) for attention in given.attention]
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(json.dumps({"device": where, "torch": torch.__version__, "setting": vars(given), "results": results}))


if __name__ == "__main__":
    main()
