"""One session with real SGLang servers on one GPU: what they force on `miles.protocols.RolloutEngine`.

    PYTHONPATH=. python3 scripts/gpu/seam_sglang.py [--only CHECK ...] [--keep]

Builds a tiny Qwen3 and a tiny Qwen3-MoE with random weights, each in two versions, starts three servers side by side
(`dense`; `moe`, which returns routed experts; `seeded`, deterministic, streaming, started without real weights), and
runs the checks of `seam_checks.py` and `seam_control.py` through the engine of miles-sglang. New weights come from a
second process on the same GPU, over CUDA IPC, or from disk; transformers' own forward pass is the reference. Every
check's figures go to `$OUT/seam_sglang.json`, sample replies to `$OUT/replies.json`, and a table is printed last.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from miles_sglang.engine import SGLangEngine
from miles_sglang.fleet import LONG
from miles_sglang.options import ExternalOptions
from miles_sglang.sender import Sender

from miles.api import EngineContext
from miles.toolkit import Shipment

VOCABULARY, EOS = 1024, 1
SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
COMMON = (
    "--skip-tokenizer-init --attention-backend triton --sampling-backend pytorch --grammar-backend none "
    "--disable-piecewise-cuda-graph --weight-version 1 --mem-fraction-static 0.6 --max-total-tokens 262144 "
    "--cuda-graph-max-bs-decode 256 --log-level warning"
)
SERVERS = {
    "dense": (31100, "dense-1", "--enable-memory-saver --incremental-streaming-output"),
    "moe": (31200, "moe-1", "--enable-return-routed-experts"),
    "seeded": (
        31300,
        "dense-1",
        "--enable-deterministic-inference --incremental-streaming-output --load-format dummy",
    ),
}


# ------------------------------------------------------------------------------------------------------ tiny models


def build(directory: Path) -> None:
    """`dense-1`, `dense-2`, `moe-1`, `moe-2`: bf16 checkpoints; version 2 is another draw mixed into version 1."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": EOS,
    }
    experts: dict[str, Any] = {
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    }
    kinds: dict[str, Callable[[], Any]] = {
        "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
        "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)),
    }
    for kind, make in kinds.items():
        models = []
        for version in (1, 2):
            torch.manual_seed(version)
            models.append(make())
            with torch.no_grad():
                models[-1].lm_head.weight.mul_(3.0)
                models[-1].lm_head.weight[EOS] = 0.0  # rarely drawn, so that samples reach their length
        with torch.no_grad():
            for old, new in zip(models[0].parameters(), models[1].parameters(), strict=True):
                new.copy_(0.8 * old + 0.6 * new if new.ndim > 1 else old + 0.1 * torch.randn_like(old))
        for version, model in enumerate(models, start=1):
            model.bfloat16().save_pretrained(directory / f"{kind}-{version}")


class Reference:
    """transformers' forward pass of one checkpoint, in one number format."""

    def __init__(self, checkpoint: Path, dtype: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()

    def forward(self, tokens: list[int], **kwargs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([tokens], device=self.device), use_cache=False, **kwargs)

    def distribution(self, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities `[T - 1, V]`, row t predicting `tokens[t + 1]`."""
        logits = self.forward(tokens).logits[0, :-1].float() / temperature
        return logits.log_softmax(-1).cpu().numpy()

    def log_probs(self, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        """Of each given token, `[T]`, 0 at position 0."""
        rows = self.distribution(tokens, temperature)
        return np.concatenate([[0.0], rows[np.arange(len(rows)), tokens[1:]]])

    def experts(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The router's choices `[T - 1, layers, top_k]`, sorted, and the margin `[T - 1, layers]` of the last one."""
        logits = self.forward(tokens, output_router_logits=True).router_logits
        top_k = self.model.config.num_experts_per_tok
        best = [layer[: len(tokens) - 1].float().topk(top_k + 1) for layer in logits]
        chosen = np.stack([b.indices[:, :top_k].sort(-1).values.cpu().numpy() for b in best], axis=1)
        return chosen, np.stack([(b.values[:, -2] - b.values[:, -1]).cpu().numpy() for b in best], axis=1)


# ------------------------------------------------------------------------------------- weights, from another process


def send() -> None:
    """The other process: holds checkpoints on the GPU. Reads orders on stdin, writes one line a bucket on stdout, and
    gives a bucket's memory back when told that it was copied, or when the next order comes."""
    from multiprocessing.reduction import ForkingPickler

    import torch
    from safetensors.torch import load_file

    torch.multiprocessing.set_sharing_strategy("file_system")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held: dict[str, dict[str, Any]] = {}
    order = json.loads(sys.stdin.readline() or "null")
    while order is not None:
        path = order["checkpoint"]
        held.setdefault(path, load_file(Path(path) / "model.safetensors", device=device))
        named = {name: tensor for name, tensor in held[path].items() if name not in order["skip"]}
        named |= {name: torch.zeros(shape, device=device) for name, shape in order["extra"].items()}
        groups: list[list[str]] = [[]]
        size = 0
        for name, tensor in named.items():
            if groups[-1] and size + tensor.nbytes > order["bucket_bytes"]:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensor.nbytes
        for names in groups:
            flat = torch.cat([named[name].flatten().view(torch.uint8) for name in names])
            ends = np.cumsum([named[name].nbytes for name in names]).tolist()
            views = [
                (name, flat[end - named[name].nbytes : end].view(named[name].dtype).view(named[name].shape))
                for name, end in zip(names, ends, strict=True)
            ]
            pickled = io.BytesIO()
            ForkingPickler(pickled).dump(views)  # the tensors travel as one CUDA IPC handle and offsets
            print(json.dumps([order["push"], [base64.b64encode(pickled.getvalue()).decode()]]), flush=True)
            answer = json.loads(sys.stdin.readline() or "null")
            del flat, views
            if answer != "copied":
                order = answer  # that push was given up
                break
        else:
            print(json.dumps([order["push"], None]), flush=True)
            order = json.loads(sys.stdin.readline() or "null")


class Trainer:
    """The driver's end of that process."""

    async def start(self) -> None:
        self._push = 0
        self._process = process = await asyncio.create_subprocess_exec(
            *[sys.executable, __file__, "send"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | SAFE,
            limit=1 << 28,
        )
        assert process.stdin
        assert process.stdout
        self._orders, self._lines = process.stdin, process.stdout

    async def buckets(
        self, checkpoint: Path, skip: tuple[str, ...] = (), extra: dict[str, list[int]] | None = None, mib: int = 64
    ) -> AsyncIterator[list[str]]:
        self._push = push = self._push + 1
        order = {"checkpoint": str(checkpoint), "skip": skip, "extra": extra or {}, "bucket_bytes": mib << 20}
        self._say(order | {"push": push})
        while True:
            of, bucket = json.loads(await self._lines.readline())
            if of != push:
                continue  # left over from a push that was given up
            if bucket is None:
                return
            yield bucket
            self._say("copied")

    def _say(self, what: Any) -> None:
        self._orders.write(json.dumps(what).encode() + b"\n")

    async def close(self) -> None:
        self._orders.close()
        await self._process.wait()


class Attached(SGLangEngine):
    """The engine of miles-sglang at a server that was started here, so that flags and sudden ends are this script's to
    choose. Besides checkpoints it takes buckets that the other process made (`cuda_ipc`)."""

    def __init__(self, url: str, checkpoint: Path, stream: bool = False):
        from transformers import AutoConfig

        context = EngineContext(
            checkpoint=checkpoint,
            hf_config=AutoConfig.from_pretrained(checkpoint),
            tokenizer=None,
            bridge=None,  # type: ignore[arg-type]  # names of weights are SGLang's to know
            device="cuda",
            dtype="bf16",
            load_weights=True,
            run_dir=checkpoint,
        )
        super().__init__(ExternalOptions(urls=(url,), stream=stream), context=context)
        self.accepts |= {"cuda_ipc"}
        self.routes = self._routing is not None

    def streaming(self, stream: bool) -> None:
        self.options = self.options.model_copy(update={"stream": stream})

    def _from_disk(self, sender: Sender, payload: Any) -> Awaitable[None]:
        if isinstance(payload, Path):
            return super()._from_disk(sender, Shipment("", {"folder": str(payload)}))
        return self._from_process(sender, payload)

    async def _from_process(self, sender: Sender, buckets: AsyncIterator[list[str]]) -> None:
        async for bucket in buckets:
            body = {"serialized_named_tensors": bucket, "flush_cache": False}
            await sender.tell("/update_weights_from_tensor", body, LONG, tries=1)


# --------------------------------------------------------------------------------------------------------- the lab


@dataclass
class Lab:
    """What the checks work with."""

    directory: Path
    engines: dict[str, Attached]
    processes: dict[str, subprocess.Popen]
    trainer: Trainer
    replies: dict[str, Any] = field(default_factory=dict)
    references: dict[tuple[str, str], Reference] = field(default_factory=dict)

    def reference(self, checkpoint: str, dtype: str = "bfloat16") -> Reference:
        key = (checkpoint, dtype)
        if key not in self.references:
            self.references[key] = Reference(self.directory / checkpoint, dtype)
        return self.references[key]

    def url(self, server: str) -> str:
        return f"http://127.0.0.1:{SERVERS[server][0]}"


def answers(port: int) -> bool:
    import httpx

    try:
        httpx.get(f"http://127.0.0.1:{port}/model_info", timeout=2)
    except httpx.HTTPError:
        return False
    return True


def launch(directory: Path, logs: Path) -> dict[str, subprocess.Popen]:
    """Start every server that is not up yet; each leads its own process group."""
    processes = {}
    for name, (port, checkpoint, flags) in SERVERS.items():
        if answers(port):
            continue
        command = f"{sys.executable} -m sglang.launch_server --model-path {directory / checkpoint} --port {port}"
        processes[name] = subprocess.Popen(
            f"{command} --host 127.0.0.1 {COMMON} {flags}".split(),
            env=os.environ | SAFE | {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1", "HF_HUB_OFFLINE": "1"},
            stdout=(logs / f"{name}.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return processes


def stop(processes: dict[str, subprocess.Popen]) -> None:
    for process in processes.values():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # the server had ended by itself


async def session(directory: Path, out: Path, only: list[str], keep: bool) -> dict[str, Any]:
    import seam_checks as ask
    import seam_control as control

    processes = launch(directory, out)
    results: dict[str, Any] = {"versions": versions(), "seconds": {}}
    try:
        begun = time.perf_counter()
        engines = {
            name: Attached(f"http://127.0.0.1:{port}", directory / checkpoint, stream=name == "seeded")
            for name, (port, checkpoint, _) in SERVERS.items()
        }
        lab = Lab(directory, engines, processes, Trainer())

        async def ready(name: str) -> None:
            starting = asyncio.create_task(engines[name].start())
            while not starting.done():
                await asyncio.wait({starting}, timeout=0.5)
                if name in processes and processes[name].poll() is not None:
                    starting.cancel()
                    print(f"{name} ended by itself\n", (out / f"{name}.log").read_text()[-4000:], flush=True)
                    return
            starting.result()
            results["seconds"][f"start {name}"] = round(time.perf_counter() - begun, 1)

        await asyncio.gather(lab.trainer.start(), *[ready(name) for name in engines])
        for check in [
            *[ask.log_probs, ask.scoring, ask.truncated_sampling, ask.routed_experts, ask.stopping],
            *[control.first_push, ask.seeds, control.push_over_cuda_ipc, control.push_from_disk, control.aborting],
            *[control.push_while_running, control.one_stamp_a_reply, ask.throughput, control.sleeping],
            control.sudden_ends,
        ]:
            if only and check.__name__ not in only:
                continue
            begun = time.perf_counter()
            try:
                results[check.__name__] = await asyncio.wait_for(check(lab), 120)
            except Exception as error:  # one failed check must not cost the session its other figures
                results[check.__name__] = {"error": repr(error), "traceback": traceback.format_exc()}
            results["seconds"][check.__name__] = round(time.perf_counter() - begun, 1)
            (out / "replies.json").write_text(json.dumps(lab.replies))
            (out / "seam_sglang.json").write_text(json.dumps(results, indent=1))
        await asyncio.gather(lab.trainer.close(), *[engine.close() for engine in engines.values()])
    finally:
        if not keep:
            stop(processes)
    return results


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in ("torch", "transformers", "sglang", "sglang-kernel", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def show(results: dict[str, Any]) -> None:
    """One line a figure."""
    for check, figures in results.items():
        print(f"\n{check}")
        for name, value in figures.items():
            print(f"    {name:<44} {value if name != 'traceback' else value[-1500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of checks; all of them when not given")
    parser.add_argument("--keep", action="store_true", help="leave the servers running, for another call")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/seam"))
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT", arguments.directory))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if not (arguments.directory / "moe-2").exists():
        build(arguments.directory)
    os.environ.update(SAFE)
    show(asyncio.run(session(arguments.directory, out, arguments.only, arguments.keep)))


if __name__ == "__main__":
    send() if sys.argv[1:] == ["send"] else main()
