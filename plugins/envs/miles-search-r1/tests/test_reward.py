"""Scores worked out by hand: every cell of the table, and what must not count."""

import asyncio

import pytest
from miles_search_r1.notation import Document, information
from miles_search_r1.plugin import RewardOptions, SearchOptions
from miles_search_r1.reward import SearchR1Reward, normalized, targets_in

from miles.api import DataError, Prompt, Sample

FOUND = information([Document("Amber Falcon", "It is in the Dunmore!")], 4000)
OTHER = information([Document("Amber Otter", "It is in Dunmoreland.")], 4000)
LOOK, SAY = "<think>a</think><search>q</search>", "<think>b</think><answer>{}</answer>"
REMINDER = SearchOptions().invalid_action_message
EXAMPLE = [{"role": "user", "content": "Answer like <answer> Dunmore </answer>. Where is it?"}]
OPTIONS = {"structure_format_score": 0.2, "final_format_score": 0.1, "retrieval_score": 0.05}


def sample_of(*said, label="Dunmore", prompt=EXAMPLE):
    """What model and environment say in turns, the model first."""
    sample = Sample.begin(Prompt("s:0", "s", messages=prompt, label=label, tokens=[1]), id=0, group_id=0)
    roles = ("assistant", "user") * len(said)
    sample.messages += [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    sample.text = "".join(said)
    return sample


def score(sample, **options):
    return asyncio.run(SearchR1Reward(RewardOptions(**{**OPTIONS, **options})).score(sample))


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ((LOOK, FOUND, SAY.format("Dunmore")), 1.0),
        ((SAY.format(" the DUNMORE. "),), 1.0),
        (("<answer>Dunmore</answer>",), 0.8),
        (("hm", REMINDER, SAY.format("Dunmore")), 0.8),
        ((LOOK, FOUND, SAY.format("Velby")), 0.25),
        ((LOOK, OTHER, SAY.format("Velby")), 0.2),
        ((LOOK, OTHER, LOOK, FOUND, SAY.format("Velby")), 0.25),
        ((SAY.format("Velby"),), 0.2),
        (("<answer>Velby</answer>",), 0.1),
        ((LOOK, FOUND, "<answer></answer>"), 0.1),
        ((LOOK, FOUND), 0.0),
        (("I do not know",), 0.0),
        (("hm", REMINDER, "hm", REMINDER), 0.0),
        ((), 0.0),
    ],
)
def test_every_cell(said, reward):
    assert score(sample_of(*said))["reward"] == pytest.approx(reward)


@pytest.mark.parametrize(
    ("options", "right_invalid", "wrong_valid", "wrong_invalid"),
    [
        ({"structure_format_score": 0.4}, 0.6, 0.45, 0.1),
        ({"final_format_score": 0.3}, 0.8, 0.25, 0.3),
        ({"retrieval_score": 0.3}, 0.8, 0.5, 0.1),
        ({"score": 2.0}, 1.8, 0.25, 0.1),
    ],
)
def test_every_option_applies(options, right_invalid, wrong_valid, wrong_invalid):
    assert score(sample_of("<answer>Dunmore</answer>"), **options)["reward"] == pytest.approx(right_invalid)
    assert score(sample_of(LOOK, FOUND, SAY.format("x")), **options)["reward"] == pytest.approx(wrong_valid)
    assert score(sample_of("<answer>x</answer>"), **options)["reward"] == pytest.approx(wrong_invalid)


def test_parts():
    found = score(sample_of(LOOK, FOUND, SAY.format("Velby")))
    assert found == {"reward": 0.25, "exact_match": 0, "answered": 1, "valid_format": 1, "retrieved": 1}


def test_the_example_in_the_prompt_is_no_answer():
    """It is the right one, even; nobody said it."""
    for said in ((LOOK, FOUND, "well"), ("well",)):
        assert score(sample_of(*said))["answered"] == 0
    few_shot = [*EXAMPLE, {"role": "assistant", "content": SAY.format("Dunmore")}, EXAMPLE[0]]
    assert score(sample_of("well", prompt=few_shot))["answered"] == 0
    assert score(sample_of(SAY.format("Dunmore"), prompt=few_shot))["reward"] == 1


def test_information_that_the_model_makes_up_is_none():
    forged = LOOK + FOUND + SAY.format("Velby")
    found = score(sample_of(forged))
    assert (found["valid_format"], found["retrieved"], found["reward"]) == (0, 0, 0.1)
    thought = f"<think>{FOUND}</think><answer>Velby</answer>"
    assert score(sample_of(LOOK, OTHER, thought))["retrieved"] == 0


def test_thoughts_that_a_chat_format_took_out_of_the_text_are_there():
    sample = sample_of(LOOK, FOUND, SAY.format("Dunmore"))
    sample.messages[-1] = {"role": "assistant", "content": "<answer>Dunmore</answer>", "reasoning_content": "b"}
    assert score(sample)["reward"] == 1
    sample.messages[-1] = {"role": "assistant", "content": "", "reasoning_content": "<answer>Dunmore</answer>"}
    assert score(sample)["exact_match"] == 1


def test_thoughts_that_the_prompt_opened():
    said = (LOOK.removeprefix("<think>"), FOUND, SAY.format("Dunmore"))
    assert score(sample_of(*said))["valid_format"] == 0
    assert score(sample_of(*said), prompt_opens_thoughts=True)["valid_format"] == 1


def test_a_response_to_a_prompt_that_is_text():
    sample = Sample.begin(Prompt("s:0", "s", text="?", label="Dunmore", tokens=[1]), id=0, group_id=0)
    sample.text = SAY.format("Dunmore")
    assert score(sample)["reward"] == 1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("A.B.C.", "abc"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("It's", "its"),
        ("The", "the"),
        ("The The", "the the"),
        (" ?! ", "?!"),
        ("  ", ""),
        ("Ärger", "ärger"),
    ],
)
def test_normalisation(text, normal):
    assert normalized(text) == normal


@pytest.mark.parametrize(
    ("label", "targets"),
    [
        ("a", ["a"]),
        (7, ["7"]),
        (["a", "b"], ["a", "b"]),
        ({"target": ["a"]}, ["a"]),
        ({"ground_truth": {"target": ["a", "b"]}, "style": "rule"}, ["a", "b"]),
        ({"ground_truth": "a"}, ["a"]),
    ],
)
def test_labels(label, targets):
    assert targets_in(Prompt("s:0", "s", label=label)) == targets
    assert score(sample_of(SAY.format(targets[-1]), label=label))["reward"] == 1


@pytest.mark.parametrize("label", [None, [], {}, {"answer": "a"}, [None], {"ground_truth": {"target": []}}])
def test_a_label_without_an_answer_says_what_is_expected(label):
    with pytest.raises(DataError, match="ground_truth"):
        score(sample_of("x", label=label))


@pytest.mark.parametrize("label", ["A", "?"])
def test_no_answer_is_not_the_one_of_which_the_rule_would_leave_nothing(label):
    assert score(sample_of(SAY.format(f" {label} "), label=label))["exact_match"] == 1
    for wrong in ("", "the", "!"):
        assert score(sample_of(SAY.format(wrong), label=label))["exact_match"] == 0


def test_an_answer_is_said_in_one_turn():
    """In two, the environment heard none and told it so."""
    pieces = ("<answer>Dunmore", REMINDER, "</answer>", REMINDER)
    assert score(sample_of(*pieces)) == {
        "reward": 0.0, "exact_match": 0, "answered": 0, "valid_format": 0, "retrieved": 0,
    }  # fmt: skip
