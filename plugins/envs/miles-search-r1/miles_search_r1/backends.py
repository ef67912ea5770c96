"""Who is asked: a retrieval server, or Google by way of serper.dev. One query in, documents out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from miles_search_r1.connections import Connections, SearchError, post, quoted
from miles_search_r1.notation import Document, document_of
from miles_search_r1.plugin import SearchOptions

LOCAL_URL = "http://127.0.0.1:8000/retrieve"
SERPER_URL = "https://google.serper.dev/search"


class Search(Protocol):
    async def __call__(self, query: str) -> list[Document]:
        """What is found, best first. Raises SearchError."""

    async def close(self) -> None: ...


class LocalSearch:
    """A server with the API of search-r1, such as `miles search serve`.

    `POST {"queries": [...], "topk": 3, "return_scores": true}` is answered with `{"result": [[{"document": {...},
    "score": 0.8}, ...]]}`, or without scores with the documents themselves.
    """

    def __init__(self, options: SearchOptions):
        self.options, self.url = options, options.url or LOCAL_URL
        self._connections = Connections()

    async def __call__(self, query: str) -> list[Document]:
        options = self.options
        body = {"queries": [query], "topk": options.topk, "return_scores": True}
        answer = await post(self._connections.session, self.url, body, timeout=options.timeout, retries=options.retries)
        return _read(self.url, answer, _results, options.topk)

    async def close(self) -> None:
        await self._connections.close()


class SerperSearch:
    """Google's results, as serper.dev gives them: titles and snippets."""

    def __init__(self, options: SearchOptions):
        self.options, self.url = options, options.url or SERPER_URL
        self._connections = Connections()

    async def __call__(self, query: str) -> list[Document]:
        options = self.options
        answer = await post(
            self._connections.session,
            self.url,
            {"q": query, "num": options.topk},
            timeout=options.timeout,
            retries=options.retries,
            headers={"X-API-KEY": os.environ.get(options.api_key_variable, "")},
        )
        return _read(self.url, answer, _organic, options.topk)

    async def close(self) -> None:
        await self._connections.close()


BACKENDS: dict[str, Callable[[SearchOptions], Search]] = {"local": LocalSearch, "serper": SerperSearch}


def _read(url: str, answer: Any, read: Callable[[Any], Sequence[Document]], topk: int) -> list[Document]:
    try:
        return list(read(answer))[:topk]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SearchError(
            f"{url}: the reply is no result of a search ({type(error).__name__}: {error}): {quoted(answer)}"
        ) from error


def _results(answer: Any) -> Sequence[Document]:
    (found,) = answer["result"]
    return [document_of(row.get("document", row)) for row in found]


def _organic(answer: Any) -> Sequence[Document]:
    return [Document(row.get("title", ""), row.get("snippet", "")) for row in answer["organic"]]
