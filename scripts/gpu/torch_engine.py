"""The built-in engine on a GPU: CUDA graphs against eager decoding against transformers, memory, and speed.

    python scripts/gpu/torch_engine.py [--device cuda] [--tokens 256] [--requests 64 256]

Models are built from their configs with random weights. Prints one line of JSON; `ok` says whether every check held:
log-probabilities of what was generated with graphs and without agree with a transformers forward within the rounding
of the number format, sleeping gives the memory back, and the same requests give the same tokens afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from miles_qwen.bridge import QwenBridge
from torch import nn

from miles.builtins.torch_engine.engine import TorchEngine
from miles.builtins.torch_engine.options import TorchEngineOptions
from miles.protocols import EngineContext, EnginePart
from miles.types import GenerateRequest, GenerateResult, SamplingParams, WeightGroup

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
QWEN3_06B = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    config: dict[str, Any]
    dtype: str
    tolerance: float
    """Mean |log-probability - transformers'| per token."""


CASES = (
    Case("dense_fp32", "Qwen3", SMALL, "fp32", 2e-5),
    Case("dense_bf16", "Qwen3", SMALL, "bf16", 3e-2),
    Case("moe_bf16", "Qwen3Moe", {**SMALL, **EXPERTS}, "bf16", 6e-2),
)


def make_model(case: Case, device: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.family}Config")(**case.config)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, 0.0, 0.05)
    return model.to(device, torch.bfloat16 if case.dtype == "bf16" else torch.float32)


def weights_of(model: Any) -> Iterator[WeightGroup]:
    groups = ({name: tensor} for name, tensor in model.state_dict().items())
    return QwenBridge().from_world("torch", model.config, groups)


async def started(model: Any, dtype: str, device: str, **options: Any) -> TorchEngine:
    context = EngineContext(
        checkpoint=Path(),
        hf_config=model.config,
        tokenizer=None,
        bridge=QwenBridge(),
        device=device,
        dtype=dtype,
        load_weights=False,
        run_dir=Path(),
    )
    engine = TorchEngine(TorchEngineOptions(**options), context=context)
    await engine.start()
    await engine.receive("inprocess", 1, weights_of(model))
    return engine


def requests(count: int, vocabulary: int, tokens: int, seed: int = 0, longest: int = 96) -> list[GenerateRequest]:
    """Groups of four samples; every other group is shorter than the rest, so that sequences are uneven."""
    generator = random.Random(seed)
    made = []
    for group in range(-(-count // 4)):
        prompt = generator.choices(range(vocabulary), k=longest - 40 * (group % 2))
        for i in range(4):
            params = SamplingParams(temperature=1.0, max_new_tokens=tokens - 7 * (group % 3))
            made.append(GenerateRequest(f"{group}.{i}", prompt, params, seed=4 * group + i))
    return made[:count]


async def generate(engine: TorchEngine, batch: list[GenerateRequest]) -> list[GenerateResult]:
    return await asyncio.gather(*(engine.generate(request) for request in batch))


@torch.no_grad()
def gap_to_transformers(model: Any, batch: list[GenerateRequest], results: list[GenerateResult]) -> float:
    gaps = []
    for request, result in zip(batch, results, strict=True):
        ids = torch.tensor([request.tokens + result.tokens], device=model.device)
        rows = model(ids).logits[0, len(request.tokens) - 1 : -1].float().log_softmax(-1)
        expected = rows.gather(-1, ids[0, len(request.tokens) :, None])[:, 0].cpu().numpy()
        gaps.append(np.abs(np.array(result.log_probs) - expected))
    return float(np.concatenate(gaps).mean())


async def check(case: Case, device: str) -> dict[str, Any]:
    model = make_model(case, device)
    batch = requests(24, model.config.vocab_size, 80)
    figures: dict[str, Any] = {}
    said: dict[bool, list[GenerateResult]] = {}
    for graphs in (True, False):
        engine = await started(model, case.dtype, device, cuda_graphs=graphs, memory_fraction=0.05)
        said[graphs] = await generate(engine, batch)
        figures["recorded" if graphs else "eager_recorded"] = recorded(engine)
        figures["graphs_gap" if graphs else "eager_gap"] = gap_to_transformers(model, batch, said[graphs])
        if graphs:
            figures |= await nap(engine, batch, said[True])
        await engine.close()
    pairs = zip(said[True], said[False], strict=True)
    figures["same_tokens"] = float(np.mean([one.tokens == other.tokens for one, other in pairs]))
    figures["ok"] = (
        max(figures["graphs_gap"], figures["eager_gap"]) < case.tolerance
        and figures["eager_recorded"] == 0
        and (figures["recorded"] > 0 or device == "cpu")
        and (figures["same_tokens"] > 0.9 or case.dtype == "bf16")
        and figures["same_after_sleep"]
        and (figures["freed_mib"] > 0 or device == "cpu")
    )
    return figures


def recorded(engine: TorchEngine) -> int:
    graphs = engine.scheduler.arena.graphs
    return len(graphs.recorded) if graphs is not None else 0


async def nap(engine: TorchEngine, batch: list[GenerateRequest], before: list[GenerateResult]) -> dict[str, Any]:
    """Sleep, wake, sync, generate again."""
    parts: frozenset[EnginePart] = frozenset({"weights", "kv_cache", "graphs"})
    held = allocated()
    await engine.sleep(parts)
    freed = held - allocated()
    await engine.wake(parts)
    again = await generate(engine, batch)
    same = [one.tokens == other.tokens for one, other in zip(before, again, strict=True)]
    return {"freed_mib": freed, "same_after_sleep": all(same)}


def allocated() -> float:
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


async def speed(counts: list[int], tokens: int, device: str) -> dict[str, float]:
    """Generated tokens per second at the shapes of Qwen3-0.6B in bf16, after a warm-up at the same sizes."""
    model = make_model(Case("speed", "Qwen3", QWEN3_06B, "bf16", 0.0), device)
    figures: dict[str, float] = {}
    for graphs in (True, False):
        engine = await started(model, "bf16", device, cuda_graphs=graphs, max_len=4096)
        for count in counts:
            for seed in (1, 2):
                start = time.perf_counter()
                results = await generate(engine, requests(count, 151936, tokens, seed=seed, longest=256))
                seconds = time.perf_counter() - start
            figures[f"{'graphs' if graphs else 'eager'}_{count}"] = round(sum(len(r.tokens) for r in results) / seconds)
        await engine.close()
    return figures


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, nargs="*", default=[64, 256])
    arguments = parser.parse_args()
    checks = {case.name: await check(case, arguments.device) for case in CASES}
    figures: dict[str, Any] = {"checks": checks, "ok": all(found["ok"] for found in checks.values())}
    if arguments.requests:
        figures["tokens_per_second"] = await speed(arguments.requests, arguments.tokens, arguments.device)
    figures["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    figures["torch"] = torch.__version__
    print(json.dumps(figures))


if __name__ == "__main__":
    asyncio.run(main())
