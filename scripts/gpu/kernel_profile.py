"""Where the time of a step goes, by torch's profiler: kernels, classes of kernels, and how long the device was idle."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

CLASSES = (
    ("communication", r"nccl|all_?gather|reduce_?scatter|all_?reduce|gloo"),
    ("attention", r"flash|fmha|attention|varlen"),
    ("optimizer", r"adam|multi_tensor|lpnorm|foreach|addcdiv"),
    ("matmul", r"gemm|cublas|cutlass|nvjet|xmma|splitk|\bmm\b|matmul|addmm"),
    ("softmax and logits", r"softmax|logsumexp|online|argmax|triton.*(gather|scatter|amax)"),
    ("norm", r"norm|rms|triton.*rsqrt"),
    ("memcpy", r"memcpy|memset"),
    ("elementwise, compiled", r"triton"),
    ("elementwise", r"elementwise|vectorized|reduce|index|embedding|fill|cat|copy|scatter|gather"),
)
"""Kernels by their names, the first that fits."""


def profiled(step: Callable[[], object], on_cuda: bool, most: int) -> dict[str, Any]:
    """Shares of kernels and of classes of kernels in one step, the `most` that take longest; on CUDA the share of it in
    which the device did nothing, too. On a CPU operators take the place of kernels."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=kinds) as profile:
        _wait(on_cuda)
        started = time.perf_counter()
        step()
        _wait(on_cuda)
        wall = time.perf_counter() - started
    kernels: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in profile.events() or []:
        if on_cuda and event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name].append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
        elif not on_cuda and event.self_cpu_time_total:
            kernels[event.name].append(event.self_cpu_time_total)
    total = sum(map(sum, kernels.values()))
    classes: dict[str, float] = defaultdict(float)
    for name, times in kernels.items():
        classes[kind_of(name)] += sum(times) / total
    top = sorted(kernels, key=lambda name: -sum(kernels[name]))[:most]
    found: dict[str, Any] = {
        "wall_seconds": wall,
        "classes": dict(sorted(classes.items(), key=lambda item: -item[1])),
        "kernels": [
            {
                "name": name[:140],
                "class": kind_of(name),
                "share": sum(kernels[name]) / total,
                "ms": sum(kernels[name]) / 1e3,
                "calls": len(kernels[name]),
            }
            for name in top
        ],
    }
    if spans:
        whole = max(end for _, end in spans) - min(start for start, _ in spans)
        found["idle_share"] = 1 - covered(spans) / whole
    return found


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def covered(spans: list[tuple[float, float]]) -> float:
    """How much of the axis intervals cover together."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def tell_profile(found: dict[str, Any]) -> None:
    print(f"  one step of {found['wall_seconds']:.2f} s; idle {found.get('idle_share', 0):.1%} of the device's time")
    for name, share in found["classes"].items():
        print(f"    {share:6.1%}  {name}")
    for row in found["kernels"]:
        print(f"    {row['share']:6.1%} {row['ms']:9.1f} ms {row['calls']:6d} x  [{row['class']}] {row['name']}")


def _wait(on_cuda: bool) -> None:
    if on_cuda:
        torch.cuda.synchronize()
