"""The retrieval server over HTTP, and the command that starts it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request

import aiohttp
import pytest
from miles_search_r1.command import run
from miles_search_r1.embedding import Embedding
from miles_search_r1.environment import SearchR1
from miles_search_r1.index import Building, build_index
from miles_search_r1.plugin import SearchOptions
from miles_search_r1.server import Batcher, make_app

from miles.api import Action, ConfigError
from miles.cli import Call, main


@pytest.fixture(scope="module")
def index(corpus_file, tmp_path_factory):
    return build_index(corpus_file, tmp_path_factory.mktemp("index") / "i", Embedding("wordllama"), Building())


@pytest.fixture(scope="module")
def server(index, serving):
    with serving(make_app(index, topk=2)) as url:
        yield url


def ask(url, body):
    """(status, JSON)."""

    async def main():
        async with aiohttp.ClientSession() as session:
            data = body if isinstance(body, str) else json.dumps(body)
            async with session.post(f"{url}/retrieve", data=data) as reply:
                return reply.status, await reply.json()

    return asyncio.run(main())


def test_scores_and_documents(server, index):
    status, answer = ask(server, {"queries": ["amber falcon", "merry badger"], "topk": 3, "return_scores": True})
    assert status == 200
    first, second = answer["result"]
    assert [len(first), len(second)] == [3, 3]
    assert first[0]["document"] == index.corpus[0]
    assert second[0]["document"] == index.corpus[3]
    scores = [hit["score"] for hit in first]
    assert scores == sorted(scores, reverse=True)


def test_documents_alone_and_how_many(server, index):
    _, answer = ask(server, {"queries": ["amber falcon"]})
    assert len(answer["result"][0]) == 2
    assert answer["result"][0][0] == index.corpus[0]
    assert ask(server, {"queries": []}) == (200, {"result": []})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "Invalid JSON"),
        ({}, "queries: Field required"),
        ({"queries": "amber"}, "queries: Input should be a valid"),
        ({"queries": [3]}, "queries.0"),
        ({"queries": ["a"], "topk": 0}, "topk"),
        ({"queries": ["a"] * 5000}, "queries"),
    ],
)
def test_requests_that_make_no_sense(server, body, said):
    status, answer = ask(server, body)
    assert status == 400
    assert said in answer["error"]


def test_health(server):
    with urllib.request.urlopen(f"{server}/health") as reply:
        health = json.loads(reply.read())
    assert (health["passages"], health["model"]) == (4, "wordllama")


def test_the_environment_asks_it(server):
    async def main():
        environment = SearchR1(SearchOptions(url=f"{server}/retrieve", topk=1))
        try:
            return await environment.step(Action("<search>where is the Merry Badger?</search>"))
        finally:
            await environment.close()

    shown = asyncio.run(main()).messages[0]["content"]
    found = "Doc 1(Title: Merry Badger) The inn Merry Badger is in Tolmere."
    assert shown == f"\n\n<information>{found}</information>\n\n"


class Slow:
    """An index that shows what it was asked at once, and can be made to wait or to fail."""

    def __init__(self):
        self.asked, self.go = [], threading.Event()

    def search(self, queries, topk):
        self.asked.append((list(queries), topk))
        self.go.wait(10)
        if "bad" in queries:
            raise RuntimeError("broken")
        return [[(1.0, {"id": query, "n": i}) for i in range(topk)] for query in queries]


def test_queries_that_wait_are_answered_together():
    index = Slow()

    async def main():
        batcher = Batcher(index, max_batch_size=4)
        first = asyncio.create_task(batcher.search(["a"], 1))
        await asyncio.sleep(0.05)
        given_up = asyncio.create_task(batcher.search(["x"], 1))
        others = [asyncio.create_task(batcher.search([q], k)) for q, k in (("b", 2), ("c", 1), ("d", 1), ("e", 1))]
        large = asyncio.create_task(batcher.search(list("uvwxyz"), 1))
        await asyncio.sleep(0.05)
        given_up.cancel()
        index.go.set()
        return await asyncio.gather(first, *others, large)

    found = asyncio.run(main())
    assert index.asked == [(["a"], 1), (["x", "b", "c", "d"], 2), (["e"], 1), (list("uvwxyz"), 1)]
    assert [[len(hits) for hits in answer] for answer in found] == [[1], [2], [1], [1], [1], [1] * 6]
    assert [answer[0][0][1]["id"] for answer in found] == ["a", "b", "c", "d", "e", "u"]


def test_a_search_that_fails_fails_those_who_asked():
    index = Slow()
    index.go.set()

    async def main():
        batcher = Batcher(index)
        asked = [batcher.search([query], 1) for query in ("bad", "worse")]
        failed = await asyncio.gather(*asked, return_exceptions=True)
        return failed, await batcher.search(["good"], 1)

    failed, found = asyncio.run(main())
    assert [str(error) for error in failed] == ["broken", "broken"]
    assert found[0][0][1]["id"] == "good"


# ------------------------------------------------------------------------------------------------------------- command


def test_the_commands_in_processes_of_their_own(corpus_file, tmp_path):
    """Index, serve on a free port, ask, stop by a signal."""
    out = tmp_path / "index"
    miles = [sys.executable, "-m", "miles", "search"]
    done = subprocess.run(
        [*miles, "index", corpus_file, "--out", out, "--model", "wordllama", "--kind", "HNSW16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"4 passages of {corpus_file}, embedded by wordllama: HNSW16 in {out}\n"
    assert done.stderr == "4 of 4 passages\n"
    server = subprocess.Popen(
        [*miles, "serve", out, "--port", "0", "--parameters", "efSearch=32", "--topk", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        line = server.stdout.readline()
        assert line.startswith("miles: 4 passages at http://127.0.0.1:")
        _, answer = ask(line.split()[-1].removesuffix("/retrieve"), {"queries": ["merry badger"]})
        assert [row["id"] for row in answer["result"][0]] == ["3"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["find"], "`index` or `serve` is expected"),
        (["index"], "needs a corpus to begin with"),
        (["serve", "--port", "1"], "needs a folder to begin with"),
        (["index", "c.jsonl"], "--out FOLDER"),
        (["index", "c.jsonl", "--out", "i", "--kinds", "Flat"], "'--kinds' is not known here"),
        (["index", "c.jsonl", "--out", "i", "--batch-size", "0"], "--batch-size 0: a positive whole number"),
        (["index", "c.jsonl", "--out", "i", "--pooling", "max"], "pooling 'max'"),
        (["serve", "i", "--port", "http"], "--port http: a positive whole number"),
        (["serve", "i", "--port", "70000"], "--port 70000: at most 65535"),
    ],
)
def test_words_that_make_no_sense(words, said):
    with pytest.raises(ConfigError, match=said):
        run(Call("search", list(words)))


def test_a_port_that_is_taken(server, index, corpus_file, tmp_path, capsys):
    out, port = tmp_path / "i", server.rpartition(":")[2]
    assert main(["search", "index", str(corpus_file), "--out", str(out), "--model", "wordllama"]) == 0
    assert main(["search", "serve", str(out), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_help(capsys):
    assert main(["search", "--help"]) == 0
    assert "miles search index CORPUS" in capsys.readouterr().out
    assert run(Call("search")) == 2
