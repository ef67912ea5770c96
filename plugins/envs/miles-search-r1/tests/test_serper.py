"""The back-end for Google, against a server of this machine that speaks serper.dev's format."""

import asyncio
import logging

import pytest
from miles_search_r1 import connections
from miles_search_r1.connections import SearchError
from miles_search_r1.environment import SearchR1
from miles_search_r1.plugin import SearchOptions

from miles.api import Action

KEY = "a-key-that-nobody-may-see"
ORGANIC = [
    {"title": "Amber Falcon", "link": "https://example.org/1", "snippet": "An inn in Dunmore.", "position": 1},
    {"title": "Dunmore", "link": "https://example.org/2", "position": 2},
    {"title": "Third", "link": "https://example.org/3", "snippet": "No.", "position": 3},
]
REPLY = {"searchParameters": {"q": "?"}, "organic": ORGANIC, "peopleAlsoAsk": [{"question": "?"}], "credits": 1}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr(connections, "FIRST_PAUSE", 0.001)


def search(url, **options):
    async def main():
        options_ = SearchOptions(backend="serper", url=url, api_key_variable="MY_KEY", **options)
        environment = SearchR1(options_)
        try:
            step = await environment.step(Action("<search>amber falcon inn</search>"))
            return step.messages[0]["content"], repr(step), environment.state_dict()
        finally:
            await environment.close()

    return asyncio.run(main())


def test_what_is_asked_and_shown(scripted):
    server, url = scripted((200, REPLY))
    shown, *_ = search(f"{url}/search", topk=2)
    assert (
        shown
        == "\n\n<information>Doc 1(Title: Amber Falcon) An inn in Dunmore.\nDoc 2(Title: Dunmore)</information>\n\n"
    )
    assert server.asked == [{"q": "amber falcon inn", "num": 2}]
    assert server.headers[0]["X-API-KEY"] == KEY


def test_nothing_found(scripted):
    _, url = scripted((200, {"organic": []}))
    assert "Nothing was found." in search(url)[0]


@pytest.mark.parametrize(
    "reply",
    [
        (403, {"message": "Unauthorized."}),
        (500, "down"),
        (200, "<html>"),
        (200, {"message": "no"}),
        (200, {"organic": 3}),
    ],
)
def test_the_key_is_never_shown(scripted, caplog, capfd, reply):
    _, url = scripted(reply)
    with caplog.at_level(logging.DEBUG):
        try:
            told = search(url)
        except SearchError as error:
            told = (str(error), repr(error), repr(error.__cause__))
    said = capfd.readouterr()
    assert KEY not in "".join(map(str, told)) + caplog.text + said.out + said.err


def test_a_wrong_key_is_no_fault_of_the_model(scripted):
    server, url = scripted((403, {"message": "Unauthorized."}))
    with pytest.raises(SearchError, match=r"status 403: .*Unauthorized"):
        search(url)
    assert len(server.asked) == 1
