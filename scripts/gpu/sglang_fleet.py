"""One engine on two GPUs: an SGLang server over both (tensor-parallel), or two servers behind SGLang's router.

    python scripts/gpu/sglang_fleet.py tensor router [--shape 0.6B]
    PYTHONPATH=$PWD/scripts/gpu/stand_in python scripts/gpu/sglang_fleet.py tensor --shape tiny --device cpu   # no GPU

The engine `sglang`, by itself: it draws answers, which transformers scores with the weights that the engine should
have. Then it is given others, goes to sleep and wakes, loses a server, and is started again; after each it draws anew.

    diff     |log-probability as drawn - transformers'|, mean over all tokens
    before   the same with the weights that the engine had before: what weights that did not arrive would show
    cached   share of prompt tokens from a server's cache: eight samples have a prompt in common
    idle     of both GPUs while it draws
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import Book, GpuWatch, keep_logs
from servers import OPTIONS
from sglang_job import kill_server
from shapes import make_checkpoint
from transformers import AutoModelForCausalLM

from miles.api import EngineLostError, GenerateRequest, GenerateResult, SamplingParams
from miles.config import Spec
from miles.testing import tiny
from miles.testing.contract import installed

CASES = {"tensor": 2, "router": 1}
"""Name -> GPUs of a server."""
SERVER = {**OPTIONS, "attention_backend": "triton", "mem_fraction_static": 0.4}
"""With room for the model that scores."""
PROMPTS, SAMPLES, PROMPT, RESPONSE = 32, 8, 200, 256
"""Prompts, samples of each, and the tokens of both."""
EVERYTHING = frozenset({"weights", "kv_cache", "graphs"})


class Trial:
    """An engine, and the model that it should be."""

    def __init__(self, engine: Any, model: Any, device: str):
        self.engine, self.model, self.device = engine, model, device
        self.figures: dict[str, Any] = {}
        self.version = 0

    async def timed(self, name: str, work: Awaitable[Any]) -> None:
        start = time.perf_counter()
        await work
        self.figures[name] = time.perf_counter() - start

    async def draw(self, name: str, old: Any = None) -> None:
        """Answers of the engine, judged; `old` is a model that it should be no more."""
        watch, start = GpuWatch(), time.time()
        with watch.watching():
            results = await asyncio.gather(*(self.engine.generate(request) for request in requests(name)))
            end = time.time()
            await asyncio.sleep(0.5)  # nvidia-smi reports utilisation late
        tokens = sum(len(result.tokens) for result in results)
        said = {
            "tok/s": tokens / (end - start),
            "idle": watch.idle([(start, end)]),
            "cached": sum(result.cached_tokens for result in results) / (PROMPT * len(results)),
            "versions": sorted({version for result in results for version in result.weight_versions}),
            "diff": self.apart(self.model, name, results),
        }
        if old is not None:
            said["before"] = self.apart(old, name, results)
        self.figures[name] = said

    @torch.no_grad()
    def apart(self, model: Any, name: str, results: Sequence[GenerateResult]) -> float:
        """Of one sample of each prompt: `diff`."""
        gaps = []
        for request, result in list(zip(requests(name), results, strict=True))[::SAMPLES]:
            ids = torch.tensor([[*request.tokens, *result.tokens]], device=self.device)
            logits = model(ids, use_cache=False).logits[0, PROMPT - 1 : -1].float()
            scores = logits.log_softmax(-1).gather(-1, ids[0, PROMPT:, None])[:, 0].cpu()
            gaps.append((scores - torch.tensor(result.log_probs)).abs())
        return float(torch.cat(gaps).mean())

    async def push(self) -> None:
        """The model's weights to the engine."""
        self.version += 1
        tensors = {name: weight.data for name, weight in self.model.named_parameters()}
        await self.engine.receive("inprocess", self.version, tiny.groups_of(tensors))

    async def restart(self) -> None:
        """Kill a server under its requests, wait until the engine says so, and start it again."""
        lost = asyncio.gather(*(self.engine.generate(r) for r in requests("lost")), return_exceptions=True)
        await asyncio.sleep(1.0)
        self.figures["killed"] = str(kill_server())
        ends = await lost
        self.figures["lost"] = sum(isinstance(end, EngineLostError) for end in ends)
        self.figures["other errors"] = sorted({repr(end)[:200] for end in ends if type(end) not in EXPECTED})
        await self.timed("restart", self.engine.restart())


EXPECTED = (EngineLostError, GenerateResult)


def requests(name: str) -> Iterator[GenerateRequest]:
    """Whose tokens are drawn from the name."""
    drawn, limit = random.Random(name), SamplingParams(max_new_tokens=RESPONSE)
    for prompt in range(PROMPTS):
        tokens = [drawn.randrange(10, 900) for _ in range(PROMPT)]
        for sample in range(SAMPLES):
            yield GenerateRequest(f"{name}/{prompt}/{sample}", tokens, limit, seed=sample)


@torch.no_grad()
def changed(model: Any, device: str) -> Any:
    """A copy with a fifth of every matrix drawn anew."""
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).to(device)
    copy.load_state_dict(model.state_dict())
    for weight in copy.parameters():
        if weight.ndim > 1:
            weight[..., ::5] = torch.randn_like(weight[..., ::5]) * 0.05
    return copy


async def trial(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = make_checkpoint(folder / "model", arguments.shape, arguments.device, ends=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).to(arguments.device)
    plugins, on_gpu = installed(), arguments.device.startswith("cuda")
    context = tiny.engine_context(plugins, config, folder / "model")
    context = replace(context, device=arguments.device, dtype="bf16", run_dir=folder, gpus=2, sleeps=True)
    options = {**(SERVER if on_gpu else {}), "tp_size": CASES[case]}
    engine = plugins.build("rollout_engines", Spec(name="sglang", options=options), context=context)
    one = Trial(engine, model, arguments.device)
    try:
        await one.timed("start", engine.start())
        await one.draw("cold")
        await one.draw("warm")
        one.model = changed(model, arguments.device)
        await one.timed("first sync", one.push())
        await one.timed("sync", one.push())
        await one.draw("synced", old=model)
        if on_gpu:
            await one.timed("sleep", engine.sleep(EVERYTHING))
            await one.timed("wake", engine.wake(EVERYTHING))
            await one.push()
            await one.draw("awake")
        await one.restart()
        await one.push()
        await one.draw("restarted", old=model)
        return one.figures | {"health": str(await engine.health()), "bytes": sum(w.nbytes for w in model.parameters())}
    except Exception as error:
        one.figures["error"] = repr(error)[:1500]
        return one.figures
    finally:
        await engine.close()
        keep_logs(folder, f"fleet_{case}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--shape", default="0.6B")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    book = Book(f"fleet_{'_'.join(arguments.cases)}")
    for case in arguments.cases:
        with tempfile.TemporaryDirectory(prefix=f"{case}-") as name:
            book.case(case, lambda case=case, name=name: asyncio.run(trial(case, arguments, Path(name))))
    columns = ["tok/s", "idle", "cached", "versions", "diff", "before"]
    rows: list[list[Any]] = [["case", "when", *columns]]
    for case in arguments.cases:
        figures = book.figures[case]
        for when, said in figures.items():
            if isinstance(said, dict) and "diff" in said:
                rows.append([case, when, *[said.get(column) for column in columns]])
    book.show(rows)
    for case in arguments.cases:
        print(case, {name: said for name, said in book.figures[case].items() if not isinstance(said, dict)})


if __name__ == "__main__":
    main()
