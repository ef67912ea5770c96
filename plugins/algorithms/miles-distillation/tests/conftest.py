"""Micro-batches whose logits are given, and a small server that scores tokens as SGLang does."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, pairwise

import pytest
import torch

from miles.api import LossInputs, Outputs
from miles.testing import tiny


class Logits:
    """`logits(start, end)` that remembers what it was asked for."""

    def __init__(self, logits_TV):
        self.logits_TV = logits_TV
        self.asked = []

    def __call__(self, start, end):
        self.asked.append((start, end))
        return self.logits_TV[start:end]


@pytest.fixture(scope="session")
def random_logits():
    def draw(seed, tokens=13, vocabulary=17):
        return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2

    return draw


@pytest.fixture(scope="session")
def micro_batch():
    def build(student_TV, teacher_TV=None, lengths=None, prompt=2, columns=None):
        """Samples of these lengths whose first `prompt` tokens are not trained; rows beyond the last are a pad."""
        bounds = [0, *accumulate([len(student_TV)] if lengths is None else lengths)]
        mask_T, zeros_T = torch.zeros(len(student_TV)), torch.zeros(len(student_TV))
        for start, end in pairwise(bounds):
            mask_T[start + prompt : end] = 1
        return LossInputs(
            log_probs_T=zeros_T.clone().requires_grad_(),
            old_log_probs_T=zeros_T,
            advantages_T=zeros_T,
            mask_T=mask_T,
            bounds=bounds,
            outputs=Outputs(logits=Logits(student_TV)),
            teacher_logits=None if teacher_TV is None else Logits(teacher_TV),
            columns=columns or {},
        )

    return build


class FakeSGLang(ThreadingHTTPServer):
    """A tiny Llama behind the part of SGLang 0.5.17's API that scoring needs. Replies have the keys of recorded ones.

    Attributes:
        failures: statuses with which the next requests for `/generate` are answered, before any other.
        scales: whether it knows the field `input_logprob_temperature`; SGLang does not.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lm = tiny.model(tiny.hf_config("llama"))
        self.tokenizer = tiny.tokenizer()
        self.info = {"model_path": "tiny", "is_generation": True, "model_type": "llama"}
        self.info_path = "/model_info"
        self.failures, self.calls, self.headers_seen = [], [], []
        self.scales, self.breaks_off = False, 0
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.altered = lambda meta_info: meta_info

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def scored(self, body):
        """`meta_info` of a request."""
        tokens, top = body["input_ids"], body["top_logprobs_num"]
        temperature = body.get("input_logprob_temperature", 1.0) if self.scales else 1.0
        with torch.no_grad():
            logits_TV = self.lm(torch.tensor([tokens]), use_cache=False).logits[0].float() / temperature
        log_probs_TV = logits_TV.log_softmax(-1)[:-1]
        rows = [[None, tokens[0], None]]
        rows += [[float(log_probs_TV[t, token]), token, None] for t, token in enumerate(tokens[1:])]
        rows = [[value, i if i < log_probs_TV.shape[1] - 1 else 0, None] for value, i, _ in rows]  # as SGLang does
        told = {"finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(tokens)}
        told |= {"input_token_logprobs": rows, "output_token_logprobs": [], "completion_tokens": 0}
        if top:
            values, ids = log_probs_TV.topk(top)
            pairs = zip(values.tolist(), ids.tolist(), strict=True)
            told["input_top_logprobs"] = [None, *([[v, i, None] for v, i in zip(*p, strict=True)] for p in pairs)]
        if self.scales and "input_logprob_temperature" in body:
            told["input_logprob_temperature"] = temperature
        return self.altered(told)


class Handler(BaseHTTPRequestHandler):
    server: FakeSGLang
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the test's output clean."""

    def answer(self, status, reply):
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        known = self.path == self.server.info_path
        self.answer(200 if known else 404, self.server.info if known else {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.calls.append((self.path, body))
            server.headers_seen.append(dict(self.headers))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            broken, server.breaks_off = server.breaks_off > 0, max(server.breaks_off - 1, 0)
            failure = server.failures.pop(0) if server.failures and self.path == "/generate" else None
        try:
            if broken:
                self.close_connection = True
                self.connection.close()
            elif failure:
                self.answer(failure, {"error": {"message": f"failure {failure}"}})
            elif self.path == "/generate":
                self.answer(200, {"output_ids": [], "meta_info": server.scored(body)})
            elif self.path == "/v1/tokenize" and server.tokenizer is not None:
                tokens = server.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
                self.answer(200, {"tokens": tokens, "count": len(tokens), "max_model_len": 256})
            elif self.path == "/v1/tokenize":
                self.answer(500, {"message": "Internal server error during tokenization"})
            else:
                self.answer(404, {"detail": "Not Found"})
        finally:
            with server.lock:
                server.running -= 1


@contextmanager
def serving():
    fake = FakeSGLang()
    threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield fake
    finally:
        fake.shutdown()
        fake.server_close()


@pytest.fixture
def server():
    with serving() as fake:
        yield fake


@pytest.fixture
def second_server():
    with serving() as fake:
        yield fake
