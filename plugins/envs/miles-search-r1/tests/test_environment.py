"""Episodes against servers that work, are down, slow, busy, or talk nonsense."""

import asyncio
import socket

import pytest
from miles_search_r1 import connections
from miles_search_r1.connections import Connections, SearchError
from miles_search_r1.environment import SearchR1
from miles_search_r1.plugin import SearchOptions

from miles.api import Action, ConfigError, Environments, Prompt

PROMPT = Prompt("s:0", "s", text="Answer it.\nQuestion: Where is Amber Falcon?", label={"target": ["Dunmore"]})
LOOK = "<think>a</think><search> Amber Falcon </search>"
ANSWER = "<think>b</think><answer>Dunmore</answer>"
SCORED = {"result": [[{"document": {"id": "1", "contents": '"Amber Falcon"\nIn Dunmore.'}, "score": 0.9}]]}
SHOWN = "\n\n<information>Doc 1(Title: Amber Falcon) In Dunmore.</information>\n\n"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(connections, "FIRST_PAUSE", 0.001)


def play(url, *said, **options):
    """The steps of an episode."""

    async def main():
        environment = SearchR1(SearchOptions(url=url, **options))
        try:
            await environment.reset(PROMPT)
            return [await environment.step(Action(text)) for text in said]
        finally:
            await environment.close()
            assert Connections._shared == {}

    return asyncio.run(main())


def shown(step):
    (message,) = step.messages
    return message["content"]


def test_an_episode(scripted):
    server, url = scripted((200, SCORED))
    looked, answered = play(url, LOOK, ANSWER, topk=2)
    assert shown(looked) == SHOWN
    assert looked.inline
    assert not looked.done
    assert answered.done
    assert answered.messages == ()
    assert answered.info == {"searches": 1, "search_errors": 0, "invalid_actions": 0}
    assert server.asked == [{"queries": ["Amber Falcon"], "topk": 2, "return_scores": True}]


@pytest.mark.parametrize(
    "result",
    [
        [{"id": "1", "contents": '"Amber Falcon"\nIn Dunmore.'}],
        [{"title": "Amber Falcon", "text": "In Dunmore."}],
        [{"document": {"title": "Amber Falcon", "text": "In Dunmore."}, "score": 1}] + SCORED["result"][0] * 9,
    ],
    ids=["without scores", "title and text", "more than were asked for"],
)
def test_shapes_of_results(scripted, result):
    _, url = scripted((200, {"result": [result]}))
    assert shown(play(url, LOOK, topk=1)[0]) == SHOWN


def test_nothing_found(scripted):
    _, url = scripted((200, {"result": [[]]}))
    assert shown(play(url, LOOK)[0]) == "\n\n<information>Nothing was found.</information>\n\n"


def test_an_empty_query_is_not_sent(scripted):
    server, url = scripted((200, SCORED))
    assert "Nothing was found." in shown(play(url, "<search> </search>")[0])
    assert server.asked == []


def test_a_turn_without_a_move_is_told_so():
    steps = play("http://127.0.0.1:1", "hm", "hm")
    assert shown(steps[1]) == SearchOptions().invalid_action_message
    assert steps[1].info["invalid_actions"] == 2
    assert not steps[1].done


def test_a_turn_that_was_cut_off_asks_nobody(scripted):
    server, url = scripted((200, SCORED))

    async def main():
        environment = SearchR1(SearchOptions(url=url))
        return await environment.step(Action(LOOK, finish_reason="length"))

    assert asyncio.run(main()).done
    assert server.asked == []


def test_characters_that_no_wire_carries(scripted):
    server, url = scripted((200, SCORED))
    play(url, "<search>答え\ud800\x00</search>")
    assert server.asked[0]["queries"] == ["答え?\x00"]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_server_that_is_down():
    url = f"http://127.0.0.1:{free_port()}/retrieve"
    with pytest.raises(SearchError, match=rf"^{url}: .*Cannot connect.*\(3 attempts\)$"):
        play(url, LOOK)


def test_a_server_that_is_slow(scripted):
    server, url = scripted((200, SCORED), seconds=5)
    with pytest.raises(SearchError, match=r"no reply within 0.1 seconds \(2 attempts\)"):
        play(url, LOOK, timeout=0.1, retries=1)
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers(scripted, status):
    server, url = scripted((status, "come back"), (status, "come back"), (200, SCORED))
    assert shown(play(url, LOOK)[0]) == SHOWN
    assert len(server.asked) == 3


def test_a_server_that_does_not(scripted):
    _, url = scripted((500, "x" * 900))
    with pytest.raises(SearchError, match=r"status 500: x{200}\.\.\. \(3 attempts\)"):
        play(url, LOOK)


def test_a_query_that_is_refused_is_the_models_to_know(scripted):
    server, url = scripted((400, "too long"), (200, SCORED))
    refused, found = play(url, LOOK, LOOK)
    assert shown(refused) == "\n\n<information>The search failed.</information>\n\n"
    assert shown(found) == SHOWN
    assert found.info == {"searches": 2, "search_errors": 1, "invalid_actions": 0}
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "reply",
    [
        "<html>", "{", "[" * 99_999, 3, None, [], {}, {"result": []}, {"result": [[], []]}, {"result": [3]},
        {"result": [[3]]}, {"result": [[{}]]}, {"result": [[{"document": None}]]}, {"result": [[{"contents": 1}]]},
        {"result": None}, {"error": "no"},
    ],
)  # fmt: skip
def test_nonsense_is_an_error_that_quotes_it(scripted, reply):
    _, url = scripted((200, reply))
    with pytest.raises(SearchError, match=r"no JSON|no result of a search"):
        play(url, LOOK)


def test_failures_may_be_told_instead(scripted):
    _, url = scripted((200, "<html>"), (200, SCORED))
    failed, found = play(url, LOOK, LOOK, on_failure="tell", retries=0)
    assert shown(failed) == "\n\n<information>The search failed.</information>\n\n"
    assert failed.info["search_errors"] == 1
    assert shown(found) == SHOWN


def test_trajectories_share_connections_until_the_last_is_closed(scripted):
    _, url = scripted((200, SCORED))

    async def main():
        first, second = (SearchR1(SearchOptions(url=url)) for _ in range(2))
        await asyncio.gather(first.step(Action(LOOK)), second.step(Action(LOOK)))
        ((session, users),) = Connections._shared.values()
        assert users == 2
        await first.close()
        await first.close()
        assert not session.closed
        assert shown(await second.step(Action(LOOK))) == SHOWN
        await second.close()
        assert session.closed
        assert shown(await first.step(Action(LOOK))) == SHOWN
        await first.close()
        assert Connections._shared == {}

    asyncio.run(main())


def test_no_more_searches_at_once_than_it_says(scripted):
    server, url = scripted((200, SCORED), seconds=0.05)

    async def episode(made):
        environment = made()
        await environment.reset(PROMPT)
        await environment.step(Action(LOOK))
        await environment.close()

    async def main():
        made = Environments(lambda: SearchR1(SearchOptions(url=url, concurrency=3)))
        await asyncio.gather(*(episode(made) for _ in range(9)))
        return made.metrics()

    found = asyncio.run(main())
    assert (found["calls_max"], found["errors"]) == (3, 0)
    assert len(server.asked) == 9


def test_all_attempts_fit_into_the_time_of_a_step():
    limits = SearchR1(SearchOptions(timeout=10, retries=3)).limits
    assert limits.calls == 256
    assert limits.step_timeout > 4 * 10


def test_the_script_knows_the_answer(scripted):
    server, url = scripted((200, SCORED))
    moves = list(SearchR1(SearchOptions(url=url)).script(PROMPT))
    assert play(url, *moves)[-1].done
    assert server.asked[0]["queries"] == ["Where is Amber Falcon?"]
    assert "<answer>Dunmore</answer>" in moves[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topk": 0}, "topk=0 must be at least 1"),
        ({"retries": -1}, "retries=-1"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_result_length": 0}, "max_result_length=0"),
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"backend": "serper", "api_key_variable": "NOT_THERE"}, "NOT_THERE, which api_key_variable names, is not set"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(ConfigError, match=said):
        SearchOptions(**options)
