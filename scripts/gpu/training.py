"""How fast the train backend `fsdp` learns, at shapes of Qwen3 with random weights: MFU, memory, where the time goes.

    python scripts/gpu/training.py --models 0.6B 4B --tokens 8192 16384 --variants default attention=sdpa,compile=false
    torchrun --nproc-per-node 2 scripts/gpu/training.py --models 4B --baseline one-gpu.json
    python scripts/gpu/training.py --models 4B --profile
    python scripts/gpu/training.py --device cpu --models tiny --tokens 256 --step-tokens 1024

Every model, number of tokens in a micro-batch and variant is one case, measured in turn and printed at once; with $OUT
set, all of them so far are also in $OUT/training.json. A variant is `default` or settings of the section `train`,
separated by commas; `checkpointing`, `chunk` and `reshard` stand for their longer names. On a GPU bf16 is the default.
Beside them `impl`: FA3 or FA4 for torch to take its flash attention from (those packages), or cudnn for attention=sdpa.
On one rank each case has a process of its own, so that none ends the others.

An optimizer step learns from `--step-tokens` tokens on each rank, in samples of 512 to 4,096 tokens with the GRPO
objective (clipped surrogate, entropy watched), through FsdpBackend. Two micro-batches warm up, then `--steps` are
timed; the time of a step is that of zero_grad, forward_backward and optim_step. FLOPs are those that the algorithm asks
for: 6 a token for each weight of a matrix product, and causal attention; nothing for what is computed again. MFU is
against a product of 8192 x 8192 bf16 matrices measured in the same process (`mfu`) and against the 989 TFLOP/s of the
data sheet of an H100 or H200 (`mfu_of_989`). With several ranks the lengths are the same on each.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from kernel_profile import profiled, tell_profile
from miles_qwen.bridge import QwenBridge
from shapes import COMMON, SHAPES
from torch._dynamo.utils import counters
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from transformers import AutoModelForCausalLM, Qwen3Config

from miles.api import BackendContext, MicroBatch
from miles.builtins.fsdp import backend as fsdp
from miles.builtins.fsdp.backend import FsdpBackend
from miles.builtins.losses import ppo_clip
from miles.builtins.options import PpoClipOptions
from miles.config import Config
from miles.toolkit import build_micro_batch
from miles.training.flops import ForwardCost
from miles.training.objective import Objective
from miles.training.packing import plan_micro_batches

SHORT = {"checkpointing": "gradient_checkpointing", "chunk": "log_probs_chunk_size", "reshard": "fsdp_reshard"}
DATA_SHEET = 989e12
GIB = 2**30
WANT = frozenset({"log_probs", "entropy"})


# --------------------------------------------------------------------------------------------------------------- cases


def make_backend(shape: dict[str, Any], train: dict[str, Any], device: str) -> FsdpBackend:
    """With random weights drawn on the device."""
    hf_config = Qwen3Config(**{**COMMON, **shape})
    config = Config.model_validate({"train": train, "optimizer": {"lr": 1e-6}})
    context = BackendContext(
        config=config,
        role="actor",
        checkpoint=Path("unused"),
        hf_config=hf_config,
        bridge=QwenBridge(),
        precision=None,
        transforms=(),
        rank=rank(),
        world_size=ranks(),
        device=device,
        total_steps=100,
        temperature=1.0,
    )
    fsdp.initial_weights = partial(drawn_weights, device)
    return FsdpBackend(context=context)


def drawn_weights(device: str, context: BackendContext, scorer: Any = None) -> Iterator[dict[str, torch.Tensor]]:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(context.hf_config)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in lm.named_parameters():
        if parameter.ndim == 1:
            yield {name: torch.ones(parameter.shape, device=device)}
        else:
            yield {name: torch.randn(parameter.shape, device=device, generator=generator) * 0.02}


def draw_lengths(total: int, longest: int, draw: np.random.Generator) -> list[int]:
    """Samples of 512 to 4,096 tokens (less where a micro-batch is small), long ones rarer, `total` in all."""
    low, high = min(512, longest // 8), min(4096, longest // 2)
    lengths: list[int] = []
    while (room := total - sum(lengths)) > 0:
        lengths.append(min(room, int(np.exp(draw.uniform(np.log(low), np.log(high + 1))))))
    return lengths


def make_batches(lengths: list[int], tokens: int, vocabulary: int, seed: int, device: str) -> list[MicroBatch]:
    """Prompts of an eighth of each sample, none shared; advantages as whitened rewards are."""
    draw = np.random.default_rng(seed)
    samples = [draw.integers(0, vocabulary, n) for n in lengths]
    masks = [(np.arange(n) >= n // 8).astype(np.float32) for n in lengths]
    columns = {
        "mask": masks,
        "weights": [mask / mask.sum() / len(lengths) for mask in masks],
        "advantages": [np.full(n, draw.normal(), np.float32) for n in lengths],
        "rollout_log_probs": [np.full(n, -np.log(vocabulary), np.float32) for n in lengths],
    }
    plans = plan_micro_batches(lengths, tokens)
    return [build_micro_batch(plan, samples, columns, device=device) for plan in plans]


def measure(arguments: argparse.Namespace, model: str, tokens: int, train: dict[str, Any]) -> dict[str, Any]:
    """One case."""
    shape = {**SHAPES[model], **arguments.shape}
    vocabulary = {**COMMON, **shape}["vocab_size"]
    lengths = draw_lengths(arguments.step_tokens, tokens, np.random.default_rng(0))
    torch._dynamo.reset()
    counters.clear()
    reset_peak()
    started = time.perf_counter()
    backend = make_backend(shape, train, arguments.device)
    objective = Objective(Config().algorithm, partial(ppo_clip, options=PpoClipOptions()))
    objective.tokens = float(sum(lengths))
    steps = [
        make_batches(lengths, tokens, vocabulary, 1000 * step + rank(), arguments.device)
        for step in range(arguments.steps)
    ]
    held = allocated()
    seconds: dict[str, list[float]] = defaultdict(list)
    built = time.perf_counter() - started

    def one_step(batches: list[MicroBatch]) -> float:
        """Returns the gradient norm."""
        objective.losses = []
        clock = Clock(seconds, arguments.device)
        backend.zero_grad()
        clock("zero_grad")
        backend.forward_backward(batches, objective, WANT)
        clock("forward_backward")
        report = backend.optim_step()
        clock("optimizer")
        return report.grad_norm

    one_step(steps[0][:2])
    warm_up = {name: values.pop() for name, values in seconds.items()}
    compilations = [counters["stats"]["unique_graphs"]]
    norms = [one_step(batches) for batches in steps]
    compilations.append(counters["stats"]["unique_graphs"] - compilations[0])
    backend.forward(steps[0][:1], frozenset({"log_probs"}))
    clock = Clock(seconds, arguments.device)
    backend.forward(steps[0], frozenset({"log_probs"}))
    clock("log_probs")
    phases = {name: median(values) for name, values in seconds.items()}
    cost = ForwardCost.of(backend.context.hf_config)
    assert cost is not None
    work = sum(cost(lengths))
    step = sum(phases[name] for name in ("zero_grad", "forward_backward", "optimizer"))
    found = {
        "parameters": sum(p.numel() for p in backend.scorer.parameters()),
        "attention": backend.built.attention,
        "samples": len(lengths),
        "micro_batches": len(steps[0]),
        "seconds_to_build": built,
        "seconds_to_warm_up": sum(warm_up.values()),
        "seconds": phases,
        "seconds_of_each_forward_backward": seconds["forward_backward"],
        "step_seconds": step,
        "tokens_per_second": sum(lengths) / step,
        "tflops": 3 * work / step / 1e12,
        "tflops_log_probs": work / phases["log_probs"] / 1e12,
        "grad_norm": norms[0],
        "held_gib": held / GIB,
        "peak_gib": peak() / GIB,
        "compilations": dict(zip(("warm_up", "later"), compilations, strict=True)),
    }
    if arguments.profile:
        found["profile"] = profiled(lambda: one_step(steps[0]), arguments.device == "cuda", arguments.top)
    return found


class Clock:
    """Seconds since the last call, under a name, when the device is done."""

    def __init__(self, seconds: dict[str, list[float]], device: str):
        self.seconds, self.device = seconds, device
        synchronize(device)
        self.since = time.perf_counter()

    def __call__(self, name: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name].append(now - self.since)
        self.since = now


# --------------------------------------------------------------------------------------------------------- the machine


def matmul_flops(device: str) -> float:
    """A second, of a large bf16 product of random matrices: the median of 20."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 20)


def median_seconds(function: Callable[[], object], device: str, times: int) -> float:
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(3):
        function()
    clock = Clock(seconds, device)
    for _ in range(times):
        function()
        clock("it")
    return median(seconds["it"])


def collectives(shape: dict[str, Any], device: str) -> dict[str, float]:
    """GB that a rank receives a second (size (n - 1) / n), for what FSDP2 communicates of one layer: its parameters in
    bf16, its gradients in float32."""
    shape = {**COMMON, **shape}
    heads = (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]) * shape["head_dim"]
    numel = shape["hidden_size"] * (heads + 3 * shape["intermediate_size"]) // ranks() * ranks()
    whole = torch.zeros(numel, device=device, dtype=torch.bfloat16)
    part = torch.zeros(numel // ranks(), device=device, dtype=torch.bfloat16)
    share = (ranks() - 1) / ranks() * numel / 1e9
    gather = median_seconds(lambda: dist.all_gather_into_tensor(whole, part), device, 20)
    grads, mine = whole.float(), part.float()
    scatter = median_seconds(lambda: dist.reduce_scatter_tensor(mine, grads), device, 20)
    return {
        "layer_mb_bf16": 2 * numel / 1e6,
        "all_gather_gb_per_second": 2 * share / gather,
        "reduce_scatter_gb_per_second": 4 * share / scatter,
    }


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------------------------------------------------------------


def parsed(variant: str, device: str) -> dict[str, Any]:
    """Settings of the section `train`, their values as YAML has them."""
    given = {"dtype": "bf16"} if device == "cuda" else {}
    for setting in [] if variant == "default" else variant.split(","):
        key, _, value = setting.partition("=")
        try:
            given[SHORT.get(key, key)] = json.loads(value)
        except ValueError:
            given[SHORT.get(key, key)] = value
    return given


def baseline_of(file: Path | None, case: dict[str, Any]) -> dict[str, Any] | None:
    """The same case on one rank, from an earlier run; there is nothing to reshard there."""

    def key(case: dict[str, Any]) -> list[Any]:
        settings = [s for s in case["variant"].split(",") if not s.startswith(("reshard=", "default"))]
        return [case["model"], case["tokens"], settings]

    earlier = json.loads(file.read_text())["cases"] if file else []
    return next((c for c in earlier if key(c) == key(case) and "error" not in c), None)


@contextlib.contextmanager
def implementation(name: str | None) -> Iterator[None]:
    """Where attention comes from."""
    if name is None:
        yield
    elif name == "cudnn":
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
            yield
    else:
        activate_flash_attention_impl(name)
        try:
            yield
        finally:
            restore_flash_attention_impl()


def one_case(arguments: argparse.Namespace, model: str, tokens: int, variant: str) -> dict[str, Any]:
    ceiling = matmul_flops(arguments.device)
    train = parsed(variant, arguments.device)
    case = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "matmul_tflops": ceiling / 1e12,
    }
    with implementation(train.pop("impl", None)):
        case |= measure(arguments, model, tokens, train)
    case |= {"mfu": case["tflops"] * 1e12 / ceiling, "mfu_of_989": case["tflops"] * 1e12 / DATA_SHEET}
    case["mfu_log_probs"] = case["tflops_log_probs"] * 1e12 / ceiling
    if ranks() > 1:
        case["collectives"] = collectives({**SHAPES[model], **arguments.shape}, arguments.device)
    named = {"model": model, "tokens": tokens, "variant": variant, "ranks": ranks()}
    if alone := baseline_of(arguments.baseline, named):
        case["weak_scaling"] = case["tokens_per_second"] / alone["tokens_per_second"]
    return case


def attempted(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its result, or what went wrong."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc(limit=-4)
        return {"error": f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"}


def in_a_process(named: dict[str, Any], limit: int) -> dict[str, Any]:
    """One case by this script, called once more."""
    with tempfile.NamedTemporaryFile() as file:
        only = ["--models", named["model"], "--tokens", str(named["tokens"]), "--variants", named["variant"]]
        try:
            process = subprocess.run(
                [sys.executable, *sys.argv, *only, "--into", file.name], timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit} s"}
        text = Path(file.name).read_text()
        return json.loads(text) if text else {"error": f"the process ended with {process.returncode}"}


def tell(case: dict[str, Any]) -> None:
    """One line, and the profile."""
    name = f"{case['model']} {case['tokens']} {case['variant']}"
    if "error" in case:
        print(f"{name}: {case['error']}", flush=True)
        return
    phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in case["seconds"].items())
    more = "".join(f"; {key} {case[key]}" for key in ("collectives", "weak_scaling") if key in case)
    print(
        f"{name}: MFU {case['mfu']:.1%} of {case['matmul_tflops']:.0f} TFLOP/s ({case['mfu_of_989']:.1%} of 989), "
        f"{case['tokens_per_second']:.0f} tokens/s a rank, peak {case['peak_gib']:.1f} GiB "
        f"({case['held_gib']:.1f} held); seconds: {phases}; warm-up {case['seconds_to_warm_up']:.1f}; "
        f"compiled {case['compilations']}; log-probs MFU {case['mfu_log_probs']:.1%}; "
        f"grad norm {case['grad_norm']:.4g}{more}",
        flush=True,
    )
    if "profile" in case:
        tell_profile(case["profile"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192], help="in a micro-batch")
    parser.add_argument("--variants", nargs="+", default=["default"])
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--step-tokens", type=int, default=65_536, help="of a rank in an optimizer step")
    parser.add_argument("--shape", type=json.loads, default={}, help="changes to the models' configs, as JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="one more step, under torch's profiler")
    parser.add_argument("--top", type=int, default=25, help="kernels to list")
    parser.add_argument("--limit", type=int, default=180, help="seconds for a case, on one rank")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--baseline", type=Path, help="what a run on one rank wrote, for weak scaling")
    arguments = parser.parse_args()
    if ranks() > 1:
        if arguments.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    if arguments.into:
        model, tokens, variant = arguments.models[0], arguments.tokens[0], arguments.variants[0]
        case = attempted(lambda: one_case(arguments, model, tokens, variant))
        arguments.into.write_text(json.dumps(case))
        return
    cases: list[dict[str, Any]] = []
    figures = {"torch": torch.__version__, "transformers": transformers.__version__, "cases": cases}
    out = Path(os.environ["OUT"]) / "training.json" if "OUT" in os.environ else None
    with contextlib.redirect_stdout(None) if rank() else contextlib.nullcontext():
        for model, tokens, variant in product(arguments.models, arguments.tokens, arguments.variants):
            named = {"model": model, "tokens": tokens, "variant": variant, "ranks": ranks()}
            if ranks() == 1:
                case = in_a_process(named, arguments.limit)
            else:
                case = attempted(partial(one_case, arguments, model, tokens, variant))
            cases.append(named | case)
            tell(cases[-1])
            if out and rank() == 0:
                out.write_text(json.dumps(figures, indent=1))
        if out is None:
            print(json.dumps(figures))
    if ranks() > 1:
        dist.barrier()
        os._exit(0)  # threads of gloo now and then abort a process that ends otherwise


if __name__ == "__main__":
    main()
