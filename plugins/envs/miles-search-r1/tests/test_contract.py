"""What miles asks of every environment, and of every reward."""

import socket

import pytest

from miles.api import Action
from miles.testing import EnvironmentContract, RewardContract

with socket.socket() as _taken:
    _taken.bind(("127.0.0.1", 0))
    PORT = _taken.getsockname()[1]
RESULT = {"result": [[{"document": {"id": "0", "contents": "Amber Falcon\nIn Dunmore."}, "score": 0.9}]]}
ANSWER = "<think>It says so.</think><answer>{}</answer>"


@pytest.fixture(scope="module", autouse=True)
def retrieval_server(serving, scripted_app):
    with serving(scripted_app((200, RESULT)), PORT):
        yield


class TestEnvironment(EnvironmentContract):
    name = "search_r1"
    options = {"url": f"http://127.0.0.1:{PORT}/retrieve", "topk": 1}
    bad_options = [{"topk": 0}, {"url": "here"}, {"backend": "serper", "api_key_variable": "NOT_THERE"}]
    prompt = {"text": "Question: Where is Amber Falcon?", "label": {"ground_truth": {"target": ["Dunmore"]}}}
    actions = [Action("<search>Amber Falcon</search>"), Action("hm"), Action("<answer>Dunmore</answer>")]
    ends = True


class TestReward(RewardContract):
    name = "search_r1"
    options = {"structure_format_score": 0.3}
    bad_options = [
        {"structure_format_score": 0.6},
        {"final_format_score": -1},
        {"retrieval_score": 0.7},
        {"final_format_score": 0.9},
    ]
    cases = [
        (ANSWER.format("The Dunmore."), "Dunmore", 1.0),
        ("<answer>Dunmore</answer>", {"target": ["Dunmore"]}, 0.7),
        (ANSWER.format("Velby"), ["Dunmore", "Dun More"], 0.3),
        ("<answer>Velby</answer>", "Dunmore", 0.1),
        ("Dunmore", "Dunmore", 0.0),
    ]
