"""The server under test: `miles serve` on a tiny model, or whatever answers at `MILES_SERVER_URL`.

    MILES_SERVER_URL=http://127.0.0.1:30000 pytest plugins/backends/miles-serve/tests/conformance

A server elsewhere has to serve a folder of this machine (its vocabulary is read from its config). `MILES_SERVER_OTHER`
names a checkpoint of the same shape with other weights; without it, updates from disk are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LENGTH = 4096
"""Context of the tiny model: long enough that a request can be interrupted."""


@dataclass
class Server:
    """What the tests know of a server, all of it by asking."""

    client: Any
    ask: Any
    other: str | None
    """A checkpoint of the same shape with other weights."""

    def __post_init__(self) -> None:
        self.info = self.client.get("/server_info").json
        self.model_path = self.client.get("/model_info").json["model_path"]
        config = json.loads((Path(self.model_path) / "config.json").read_text())
        self.vocabulary = config["vocab_size"]
        tokenizer = Path(self.model_path) / "tokenizer_config.json"
        most = json.loads(tokenizer.read_text()).get("model_max_length") if tokenizer.exists() else None
        self.endless = most is None or most >= 2**63
        """The tokenizer has no `model_max_length`, and SGLang cannot write the number that stands for none (1e30)."""
        self.context = self.info.get("context_length") or config["max_position_embeddings"]
        self.ours = self.info.get("server") == "miles serve"
        self.text = not self.info["skip_tokenizer_init"]
        self.one_seed = self.info["enable_deterministic_inference"] and not self.ours
        """What has no seed is drawn with one and the same."""
        self.tolerance = 1e-3 if self.ours else 0.15
        """Of log-probs that two kernels computed: another server computes in bf16."""

    def body(self, tokens: Any, length: int = 8, **more: Any) -> dict[str, Any]:
        """A greedy request with log-probs. Parameters of sampling are told from other fields by their names."""
        params = {"max_new_tokens": length, "temperature": 0.0, "ignore_eos": True}
        fields = {"stream", "rid", "logprob_start_len", "return_routed_experts", "routed_experts_start_len"}
        params |= {name: value for name, value in more.items() if name not in fields}
        rest = {name: value for name, value in more.items() if name in fields}
        return {"input_ids": tokens, "sampling_params": params, "return_logprob": True, **rest}

    def generate(self, tokens: Any, length: int = 8, **more: Any) -> Any:
        reply = self.client.post("/generate", self.body(tokens, length, **more))
        assert reply.status == 200, reply.text
        return reply.json

    def score(self, tokens: list[int], start: int = 0) -> list[Any]:
        """`input_token_logprobs` of the given tokens."""
        return self.generate(tokens, 0, logprob_start_len=start)["meta_info"]["input_token_logprobs"]

    def come_to_rest(self) -> None:
        """SGLang answers a request a moment before it has ended, and dies when its memory is released, or weights of
        another checkpoint flush its cache, in that moment. A flush that may take its time waits for it."""
        assert self.client.post("/flush_cache?timeout=30").status == 200

    def prompt(self, number: int = 0, length: int = 6) -> list[int]:
        """Tokens that no other number has; never the last one of the vocabulary, which SGLang calls 0 in scores."""
        most = self.vocabulary - 2
        return [1 + (number * 7919 + i * i * 31 + i) % most for i in range(length - 2)] + [
            1 + number % most,
            1 + number // most,
        ]

    @property
    def long(self) -> int:
        """Tokens that take seconds."""
        return min(self.context - 64, 4000)


@pytest.fixture(scope="session")
def server(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    url = os.environ.get("MILES_SERVER_URL")
    if url:
        yield Server(lab.Client(url), lab.ask, os.environ.get("MILES_SERVER_OTHER"))
        return
    config = lab.tiny.hf_config("llama", max_position_embeddings=LENGTH)
    folders = [lab.tiny.checkpoint(tmp_path_factory.mktemp("model"), config, seed) for seed in (0, 1)]
    with ExitStack() as stack:
        serving = stack.enter_context(lab.serving(folder=folders[0], incremental=True))
        yield Server(serving.client, lab.ask, str(folders[1]))
