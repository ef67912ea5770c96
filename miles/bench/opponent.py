"""transformers' own generation, in a process of its own: what the torch engine is compared with.

    python -m miles.bench.opponent '{"kind": "generate", "checkpoint": ..., "device": "cpu", "dtype": "fp32"}'

Reads a workload a line from standard input and answers each with the seconds it took. `generate` takes a padded batch
and goes on until its longest response is done. `batching` is what `generate_batch` runs on, continuous batching over a
paged cache; its manager is kept from workload to workload, and its clock runs from the first request to the last
result, so that its start-up does not count. Both draw from the whole distribution at temperature 1, and nothing ends a
response before the length that its request asks for.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

BLOCK = 256
"""Tokens in a block of the paged cache, transformers' default."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Work = dict[str, Any]
"""`prompts`: token ids of each, all of one length; `lengths` of each prompt's responses, `samples` many."""


class Lengths(StoppingCriteria):
    """Ends each row of a batch at a length of its own."""

    def __init__(self, ends_N: torch.Tensor):
        self.ends_N = ends_N

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends_N


def generate(load: Callable[[], Any]) -> Callable[[Work], float]:
    """`model.generate` on all prompts as one batch; responses that are done are padded to the longest."""
    model = load()

    def timed(work: Work) -> float:
        prompts = torch.tensor(work["prompts"], device=model.device)
        lengths = torch.tensor(work["lengths"], device=model.device).repeat_interleave(work["samples"])
        started = time.perf_counter()
        done = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=_settings(work, eos_token_id=None),
            stopping_criteria=StoppingCriteriaList([Lengths(lengths + prompts.shape[1])]),
        ).cpu()
        seconds = time.perf_counter() - started
        _check(tuple(done.shape), (len(lengths), prompts.shape[1] + max(work["lengths"])))
        return seconds

    return timed


def batching(load: Callable[[], Any]) -> Callable[[Work], float]:
    """The manager behind `model.generate_batch`, which takes a length for each request."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    models: dict[tuple[int, ...], Any] = {}

    def timed(work: Work) -> float:
        count, samples, longest = len(work["prompts"]), work["samples"], max(work["lengths"])
        shape = (count, samples, len(work["prompts"][0]), longest)
        if shape not in models:  # a model keeps one manager, made for the requests it saw first
            models[shape] = load()
        blocks = (count * samples + 1) * (-(-(shape[2] + longest) // BLOCK) + 1)
        with models[shape].continuous_batching_context_manager(
            generation_config=_settings(work, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(block_size=BLOCK, num_blocks=blocks),
            persistent_manager=True,
        ) as manager:
            started = time.perf_counter()
            for tokens, length in zip(work["prompts"], work["lengths"], strict=True):
                manager.add_request(tokens, max_new_tokens=length)
            found = sum(len(result.generated_tokens) for result in _finished(manager, count * samples))
            seconds = time.perf_counter() - started
        _check(found, sum(work["lengths"]) * samples)
        return seconds

    return timed


def _settings(work: Work, eos_token_id: int | None) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=max(work["lengths"]),
        num_return_sequences=work["samples"],
        eos_token_id=eos_token_id,
        pad_token_id=0,
    )


def _finished(manager: Any, count: int) -> list[Any]:
    """The results of so many requests."""
    results: list[Any] = []
    while len(results) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            results.append(result)
        elif result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching stopped working")
    return results


def _check(found: Any, expected: Any) -> None:
    if found != expected:
        raise RuntimeError(f"transformers generated {found}, and {expected} was asked for")


KINDS = {"generate": generate, "batching": batching}


def main(kind: str, checkpoint: str, device: str, dtype: str) -> None:
    """Answer workloads until the input ends."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    timed = KINDS[kind](lambda: AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[dtype]).eval().to(device))
    for line in sys.stdin:
        print(json.dumps(timed(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
