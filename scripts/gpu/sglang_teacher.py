"""A teacher on a real SGLang server: what it says of given tokens, and a student that learns from it.

    PYTHONPATH=. python3 scripts/gpu/sglang_teacher.py [--url URL] [--steps N]

Builds two Qwen3 models with random weights and the quickstart's tokenizer, starts SGLang on the teacher (unless `--url`
names a server that serves it already), and measures

    scores   `scoring_server` against transformers' own forward pass of the same weights: sampled tokens, 8 likeliest
    refuses  whether a temperature other than 1 is an error
    train    steps of `miles train` with the loss `distill_topk` and the estimator `distillation`, taught over HTTP

Figures are printed as one line of JSON, last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import miles
from miles.api import EngineError
from miles.config import Spec
from miles.plugins import load_plugins
from miles.protocols import EngineContext
from miles.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples" / "quickstart"))
from prepare import build_tokenizer  # noqa: E402

PORT, K = 31500, 8
SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
FLAGS = (
    "--attention-backend triton --sampling-backend pytorch --grammar-backend none --disable-piecewise-cuda-graph "
    "--mem-fraction-static 0.3 --max-total-tokens 65536 --cuda-graph-max-bs-decode 8 --log-level warning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(folder: Path) -> None:
    """`teacher` and `student`, bf16, the second a neighbour of the first; and prompts."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=2048, tie_word_embeddings=False,
        initializer_range=0.05, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    teacher, other = Qwen3ForCausalLM(config), Qwen3ForCausalLM(config)
    for name, share in (("teacher", 0.0), ("student", 0.3)):
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for mine, a, b in zip(model.parameters(), teacher.parameters(), other.parameters(), strict=True):
                mine.copy_((1 - share) * a + share * b)
        model.bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [json.dumps({"input": f"{a}+{a + 1}="}) for a in range(100, 356)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")


def serve(folder: Path, stack: ExitStack) -> str:
    """Start SGLang on the teacher; its process group ends with `stack`."""
    command = (
        f"{sys.executable} -m sglang.launch_server --model-path {folder / 'teacher'} --host 127.0.0.1 --port {PORT}"
    )
    log = stack.enter_context((folder / "server.log").open("w"))
    environment = os.environ | SAFE | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        f"{command} {FLAGS}".split(), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    stack.callback(lambda: os.killpg(process.pid, signal.SIGKILL))
    return f"http://127.0.0.1:{PORT}"


async def compare(folder: Path, url: str) -> dict[str, Any]:
    """The server's words beside transformers' on random tokens."""
    lm: Any = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16).to(DEVICE).eval()
    context = EngineContext(
        checkpoint=folder / "teacher", hf_config=lm.config, tokenizer=build_tokenizer(), bridge=None, device=DEVICE,
        dtype="bf16", load_weights=False, run_dir=folder,
    )  # fmt: skip
    spec = Spec(name="scoring_server", options={"url": url, "start_timeout": 240})
    engine = Registry(load_plugins()).build("rollout_engines", spec, context=context)
    begun = time.perf_counter()
    await engine.start()
    figures: dict[str, Any] = {"start_seconds": round(time.perf_counter() - begun, 1)}
    try:
        draw = np.random.default_rng(0)
        rows = [draw.integers(3, lm.config.vocab_size, n).tolist() for n in draw.integers(2, 400, 64)]
        begun = time.perf_counter()
        said = await asyncio.gather(*(engine.score(row) for row in rows))
        tops = await asyncio.gather(*(engine.score_top(row, K) for row in rows))
        figures["score_seconds"] = round(time.perf_counter() - begun, 2)
        differences, top_differences, same = [], [], []
        for row, log_probs, (ids, values) in zip(rows, said, tops, strict=True):
            with torch.no_grad():
                log_p = lm(torch.tensor([row], device=DEVICE)).logits[0, :-1].float().log_softmax(-1).cpu()
            own = log_p[torch.arange(len(row) - 1), torch.tensor(row[1:])]
            differences.append((torch.from_numpy(log_probs[1:]) - own).abs())
            at_theirs = log_p.gather(-1, torch.from_numpy(ids[1:]))
            top_differences.append((torch.from_numpy(values[1:]) - at_theirs).abs().flatten())
            best = log_p.topk(K).indices
            same.append(
                np.mean([len(set(a) & set(b)) / K for a, b in zip(ids[1:].tolist(), best.tolist(), strict=True)])
            )
        flat, top = torch.cat(differences), torch.cat(top_differences)
        figures |= {"tokens": len(flat), "sampled_mean": float(flat.mean()), "sampled_max": float(flat.max())}
        figures |= {"top_mean": float(top.mean()), "top_max": float(top.max()), "same_likeliest": float(np.mean(same))}
        try:
            await engine.score(rows[0], temperature=0.7)
            figures["refuses"] = "no: it scored"
        except EngineError as error:
            figures["refuses"] = str(error)[:90]
    finally:
        await engine.close()
    return figures


def train(folder: Path, url: str, steps: int, method: str) -> dict[str, Any]:
    """First and last distance from the teacher, and seconds a step."""
    settings = {
        "run": {"dir": str(folder / method), "seed": 1},
        "model": {"hf_checkpoint": str(folder / "student")},
        "data": {
            "sets": [{"path": str(folder / "prompts.jsonl"), "sampling": {"max_new_tokens": 32}}],
            "shuffle": True,
        },
        "rollout": {"num_rollout": steps, "batch_size": 16, "n_samples_per_prompt": 4},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"interval": 1000},
    }
    flags = {"distill_topk": {"preset": "distill_topk"}, "distillation": {"advantage_estimator": "distillation"}}[
        method
    ]
    miles.train(settings, opd_teacher_urls=url, **flags)
    lines = [json.loads(line) for line in (folder / method / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["step"]]
    name = "train/distill_sampled_kl" if method == "distillation" else "train/distill_reverse"
    seconds = float(np.median([line["perf/step_time"] for line in done]))
    return {"metric": name, "first": done[0][name], "last": done[-1][name], "seconds_a_step": round(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    with TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        build(folder)
        url = given.url or serve(folder, stack)
        figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"}
        figures |= {name: version(name) for name in ("torch", "transformers", *(() if given.url else ("sglang",)))}
        try:
            figures["scores"] = asyncio.run(compare(folder, url))
            figures["train"] = {m: train(folder, url, given.steps, m) for m in ("distill_topk", "distillation")}
        except Exception:
            log = folder / "server.log"
            print(log.read_text()[-4000:] if log.exists() else "", flush=True)
            raise
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
