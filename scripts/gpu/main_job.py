"""The colocated main job on one GPU, at the shape of Qwen3-0.6B with random weights: seconds, memory, agreement.

    python scripts/gpu/main_job.py speed [--tokens 8192] [--checkpointing] [--steps 4] [--set SECTION.KEY=VALUE ...]
    python scripts/gpu/main_job.py memory [--dtype fp32]

`speed` runs the recipe examples/qwen3-0.6b-grpo on made-up problems, rewarding even token ids, and says where each
step's time went, how much memory moved, and how far engine and trainer disagree. MFU counts the products that the
algorithm asks for (6 FLOP a parameter and token, 2 for the pass that recomputes log-probabilities, attention besides;
nothing for recomputed activations) against a bf16 product of 8192 x 8192 matrices measured in the same process.

`memory` trains an eight-layer model twice on the same rollouts, with plenty of memory and with a cap under which the
micro-batch does not fit, and compares; then a third time with a cap under which one sample alone does not fit.

Each prints one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import imported
from transformers import Qwen3Config, Qwen3ForCausalLM

import miles
from miles.api import hookimpl
from miles.errors import OutOfMemoryError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/qwen3-0.6b-grpo"
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
MIB = 2**20
TRAINED = ("train/loss", "train/grad_norm", "train/oom_retries", "train/train_rollout_logprob_abs_diff")
PHASES = ("step", "generate", "workers", "sync", "move", "rollout", "train")


def even(sample: Any) -> float:
    """Share of even ids among the tokens of a response."""
    response = sample.tokens[sample.prompt_length :]
    return sum(token % 2 == 0 for token in response) / max(len(response), 1)


def make_inputs(folder: Path, changes: dict[str, Any], device: str) -> None:
    """A checkpoint with the recipe's byte tokenizer, and problems in the form of its data."""
    tokenizer = imported(RECIPE / "stand_in.py").tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **changes}, **ends))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    make_problems(folder)


def make_problems(folder: Path) -> None:
    """`problems.jsonl`, in the form of the recipe's data."""
    rows = [
        {"question": f"Ann has {i} pears, buys {i % 7} and eats {i % 3}. How many are left?", "answer": f"#### {i}"}
        for i in range(512)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Watch:
    """Lifecycle hooks that time every call into workers and engine, and watch the device's memory."""

    def __init__(self, cap: Callable[[int], int] | None = None):
        """`cap`: bytes that the process may hold, from what is held when the first training begins."""
        self.cap = cap
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.freed_mib: dict[str, list[float]] = defaultdict(list)
        self.batches: list[list[int]] = []
        """Lengths of the samples of each step."""
        self.synced: list[dict[str, float]] = []
        self.awake_mib: list[float] = []
        self.before_training: list[int] = []
        self.peak: list[int] = []

    @hookimpl
    def miles_on_run_start(self, run: Any) -> None:
        workers, engine = run.parts.workers, run.parts.engines[0]
        workers.call = self._timed(workers.call, "")
        for name in ("sleep", "wake", "receive"):
            setattr(engine, name, self._timed(getattr(engine, name), name))

    def _timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        async def timed(*args: Any, **kwargs: Any) -> Any:
            what = name or args[0]
            if what == "train_step" and not self.before_training[len(self.peak) :]:
                self._begin_training()
            before, start = held(), time.perf_counter()
            result = await function(*args, **kwargs)
            self.seconds[what].append(time.perf_counter() - start)
            self.freed_mib[what].append((before - held()) / MIB)
            return result

        return timed

    def _begin_training(self) -> None:
        self.before_training.append(held())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            if self.cap is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(self.cap(held()) / total)

    @hookimpl
    def miles_on_rollout_end(self, run: Any, step: int, groups: Any, metrics: Any) -> None:
        self.awake_mib.append(held() / MIB)
        self.batches.append([len(sample.tokens) for group in groups for sample in group.samples])

    @hookimpl
    def miles_on_weight_sync_end(self, run: Any, version: int, metrics: Any) -> None:
        self.synced.append(dict(metrics))

    @hookimpl
    def miles_on_train_step_end(self, run: Any, step: int, metrics: Any) -> None:
        self.peak.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def overlay(folder: Path, run_dir: Path, new_tokens: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings for made-up problems instead of its own."""
    task = {
        "path": str(folder / "problems.jsonl"),
        "keys": {"input": "question", "label": "answer"},
        "apply_chat_template": True,
        "sampling": {"temperature": 1.0, "max_new_tokens": new_tokens},
    }
    given = {
        "run": {"dir": str(run_dir), "resume": "never"},
        "model": {"hf_checkpoint": str(folder / "model")},
        "data": {"sets": [task]},
        "eval": {"sets": [], "interval": None},
        "checkpoint": {"interval": 1000, "save_hf": None},
    }
    return {name: {**given.get(name, {}), **sections.get(name, {})} for name in {**given, **sections}}


def train(settings: dict[str, Any], watch: Watch, **flags: Any) -> list[dict[str, float]]:
    """Run the job; the metrics of each step."""
    directory = Path(settings["run"]["dir"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".yaml")
    file.write_text(json.dumps(settings))  # JSON is YAML
    miles.train([RECIPE / "config.yaml", file], reward=even, plugins=[watch], **flags)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------- speed


def speed(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = {**SHAPE, **arguments.shape}
    make_inputs(folder, arguments.shape, arguments.device)
    watch = Watch()
    settings = overlay(
        folder,
        folder / "run",
        arguments.new_tokens,
        rollout={"num_rollout": arguments.steps},
        train={"max_tokens_per_gpu": arguments.tokens, "gradient_checkpointing": arguments.checkpointing},
        weight_sync={"verify": "always"},
    )
    start = time.perf_counter()
    metrics = train(settings, watch, device=arguments.device, **dict(arguments.set))
    figures: dict[str, Any] = {
        "tokens": arguments.tokens,
        "checkpointing": arguments.checkpointing,
        **dict(arguments.set),
    }
    figures["job_seconds"] = time.perf_counter() - start
    peak_flops = matmul_flops(arguments.device)
    figures["matmul_tflops"] = peak_flops / 1e12
    steps = []
    for index, lengths in enumerate(watch.batches):
        row = {phase: metrics[index + 1].get(f"perf/{phase}_time") for phase in PHASES}
        row |= {name.removeprefix("train/train_rollout_"): metrics[index + 1].get(name) for name in TRAINED}
        row["overhead_share"] = metrics[index + 1].get("perf/overhead_share")
        row["reward"] = metrics[index + 1]["rollout/reward"]
        row["generate_tokens_per_second"] = metrics[index + 1].get("perf/generate_tokens_per_second")
        row["probe"] = watch.synced[index + 1].get("weight_sync/logprob_abs_diff")
        share = len(watch.seconds["train_step"]) // len(watch.batches)
        training = sum(watch.seconds["train_step"][share * index : share * (index + 1)])
        scoring = watch.seconds["forward"][2 * index + 1]  # those between are the probe's
        row["train_tokens_per_second"] = sum(lengths) / training
        row["train_mfu"] = flops(shape, lengths, 6) / training / peak_flops
        row["forward_tokens_per_second"] = sum(lengths) / scoring
        steps.append(row)
    figures["steps"] = steps
    figures["yardstick"] = yardstick(folder, arguments.device)
    figures["calls"] = {name: [round(s, 3) for s in seconds] for name, seconds in watch.seconds.items()}
    figures["freed_mib"] = {name: [round(m) for m in mib] for name, mib in watch.freed_mib.items()}
    figures["awake_mib"] = watch.awake_mib
    figures["before_training_mib"] = [b / MIB for b in watch.before_training]
    figures["peak_training_mib"] = [b / MIB for b in watch.peak]
    return figures


@torch.no_grad()
def yardstick(folder: Path, device: str) -> dict[str, float]:
    """Mean differences of log-probabilities on samples of the first step: transformers in bf16 and what the engine
    said, each against transformers in fp32."""
    gc.collect()
    lines = (folder / "run/rollouts/step_000001.jsonl").read_text().splitlines()[:16]
    samples = [json.loads(line) for line in lines]
    found: dict[str, list[torch.Tensor]] = {
        "rollout": [torch.tensor(generated(s, "rollout_log_probs")) for s in samples]
    }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(device)
        found[name] = []
        for sample in samples:
            ids = torch.tensor([sample["tokens"]], device=device)
            scores = model(ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].cpu()
            found[name].append(scores[sample["prompt_length"] - 1 :])
        del model
    true = torch.cat(found["fp32"])
    return {name: float((torch.cat(found[name]) - true).abs().mean()) for name in ("bf16", "rollout")}


def generated(sample: dict[str, Any], column: str) -> list[float]:
    return sample[column][sample["prompt_length"] :]


def flops(shape: dict[str, Any], lengths: list[int], factor: int) -> float:
    """Of the matrix products over samples of these lengths: `factor` 2 for a forward pass, 6 with its backward."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    kv = 2 * shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * heads + kv) + 3 * hidden * shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden
    attention = sum(n * n for n in lengths) * heads * shape["num_hidden_layers"]  # causal: half of 2 n^2 heads
    return factor * (weights * sum(lengths) + attention)


def matmul_flops(device: str) -> float:
    """Of a large bf16 product on random data."""
    size = 8192 if device != "cpu" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------------------- memory


def memory(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Out of memory for real: halves instead of a whole, and an error where halves do not help."""
    make_inputs(folder, {"num_hidden_layers": 8, **arguments.shape}, arguments.device)
    figures: dict[str, Any] = {"dtype": arguments.dtype, "tokens": arguments.tokens}

    def job(name: str, cap: Callable[[int], int] | None) -> tuple[Watch, list[dict[str, float]]]:
        watch = Watch(cap)
        settings = overlay(
            folder,
            folder / name,
            arguments.new_tokens,
            rollout={
                "num_rollout": 2,
                "batch_size": 8,
                "n_samples_per_prompt": 8,
                "engine": {"name": "torch", "kv_cache_tokens": 65_536, "prefix_cache_tokens": 8192},
            },
            train={
                "max_tokens_per_gpu": arguments.tokens,
                "gradient_checkpointing": False,
                "dtype": arguments.dtype,
                "num_steps_per_rollout": 1,
                "max_oom_retries": 8,
            },
            optimizer={"lr": 0.0},  # so that the second step, too, is about the same rollouts
        )
        try:
            return watch, train(settings, watch, device=arguments.device)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(1.0)
                torch.cuda.empty_cache()
                figures[f"{name}_left_mib"] = held() / MIB

    whole, expected = job("room", None)
    room = whole.peak[0] - whole.before_training[0]
    figures["before_mib"], figures["activations_mib"] = whole.before_training[0] / MIB, room / MIB
    capped, found = job("capped", lambda before: before + int(0.75 * room))
    figures["steps"] = {
        key: [(a.get(key), b.get(key)) for a, b in zip(expected[1:], found[1:], strict=True)] for key in TRAINED
    }
    figures["train_step_seconds"] = [whole.seconds["train_step"], capped.seconds["train_step"]]
    try:
        job("one", lambda before: before + int(0.01 * room))
    except OutOfMemoryError as error:
        figures["one_sample"] = str(error)
    return figures


# ---------------------------------------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["speed", "memory"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, help="in a micro-batch")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--shape", type=json.loads, default={}, help="changes to the model's config, as JSON")
    parser.add_argument("--set", type=setting, nargs="*", default=[], help="settings by flag name or dotted path")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (8192 if arguments.job == "speed" else 16_384)
    arguments.new_tokens = arguments.new_tokens or (512 if arguments.job == "speed" else 192)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"speed": speed, "memory": memory}[arguments.job](arguments, Path(folder))
    figures |= {"job": arguments.job, "torch": torch.__version__, "transformers": transformers.__version__}
    figures["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
