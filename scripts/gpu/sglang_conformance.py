"""The facts of the wire that `miles serve` is tested for, asked of a real SGLang server; and the engine's own contract.

    python scripts/gpu/sglang_conformance.py [--models dense moe] [--server sglang] [--flags="--attention-backend fa3"]
    python scripts/gpu/sglang_conformance.py --server miles --models tiny          # how it is tried without a GPU

For each model a server is started on a checkpoint with random weights and a chat template, and
`plugins/backends/miles-serve/tests/conformance` runs against it, with a second checkpoint for updates from disk.
Counts what passed, failed and was left out, and says whether the server is still there: one that ends fails all tests
after. Names and messages of failures are in `$OUT`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout
from cases import Book, out_folder, run_process, tail
from servers import healthy, serving
from shapes import ROOT, imported, model_config

SUITE = ROOT / "plugins/backends/miles-serve/tests/conformance"
SMALL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("0.6B", SMALL),
    "moe": ("moe", {**SMALL, "moe_intermediate_size": 256}),
    "tiny": ("tiny", {"max_position_embeddings": 4096, "tie_word_embeddings": False}),
}
"""Name -> a shape and what is changed of it, so that a request takes long enough to be interrupted, and not longer."""
SERVER = {
    "sglang": "--enable-memory-saver --incremental-streaming-output --enable-deterministic-inference "
    "--attention-backend triton --mem-fraction-static 0.3 --max-total-tokens 131072 --cuda-graph-max-bs-decode 32",
    "miles": "--incremental-streaming-output --device cpu",
}
EXPERTS = {"sglang": ["--enable-return-routed-experts"], "miles": []}


def make(folder: Path, model: str, seed: int) -> Path:
    """A checkpoint with the quickstart's tokenizer, whose ids are bytes, and weights drawn from a seed."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = imported(ROOT / "examples/quickstart/prepare.py").build_tokenizer()
    tokenizer.model_max_length = 8192  # without one, /tokenize of SGLang is an error
    shape, changes = MODELS[model]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    config = model_config(shape, **changes, **ends, vocab_size=len(tokenizer), initializer_range=0.05)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # letters and digits are said often: some tests look for a stop string in what is said
        lm.lm_head.weight[[byte for byte in range(128) if chr(byte).isalnum()]] *= 3
    lm.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def ask(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        one, other = (make(Path(name) / str(seed), model, seed) for seed in (0, 1))
        log = out_folder() / f"conformance_{model}.log"
        flags = [*SERVER[arguments.server].split(), *arguments.flags.split()]
        flags += EXPERTS[arguments.server] if model == "moe" else []
        async with serving(arguments.server, one, out_folder() / f"conformance_{model}_server.log", flags) as url:
            told = {"MILES_SERVER_URL": url, "MILES_SERVER_OTHER": str(other)}
            words = [sys.executable, "-m", "pytest", SUITE, "-p", "no:cacheprovider", "-q", "-rfEs", "--tb=short"]
            words += ["-o", "addopts=--import-mode=importlib", *arguments.pytest.split()]
            run = partial(run_process, words, log, arguments.limit, **told)
            code, seconds = await asyncio.to_thread(run)
            async with ClientSession(timeout=ClientTimeout(total=30)) as session:
                alive = await healthy(session, url)
    text = log.read_text()
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    failed = re.findall(r"(?:FAILED|ERROR) \S*::(.*)", text)
    said = "" if counts else tail(log)
    return {"code": code, "seconds": seconds, "alive": alive, **counts, "which": failed, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dense", "moe"], choices=MODELS)
    parser.add_argument("--server", default="sglang", choices=SERVER)
    parser.add_argument("--flags", default="", help="of the server, in one string")
    parser.add_argument("--pytest", default="", help="more words for pytest")
    parser.add_argument("--limit", type=float, default=150, help="seconds for a model's tests")
    arguments = parser.parse_args()
    book = Book(f"conformance_{arguments.server}")
    for model in arguments.models:
        book.case(model, lambda model=model: asyncio.run(ask(arguments, model)))
    rows: list[list[Any]] = [["model", "passed", "failed", "skipped", "alive", "seconds", "which"]]
    for model in arguments.models:
        found = book.figures[model]
        shown = [found.get(key, 0) for key in ("passed", "failed", "skipped", "alive", "case_seconds")]
        rows.append(
            [model, *shown, "; ".join(found.get("which", []))[:1500] or found.get("error") or found.get("said")]
        )
    book.show(rows)


if __name__ == "__main__":
    main()
