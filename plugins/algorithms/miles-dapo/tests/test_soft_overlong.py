"""The penalty by hand and as verl computes it; lengths of one turn and of several; the limit of the task set."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miles_dapo.plugin import SoftOverlongOptions
from miles_dapo.soft_overlong import SoftOverlong

from miles.api import LOSS_MASK, ConfigError, Group, Prompt, Sample, Turn


def sample_of(*turns, limit=None, between=0):
    """A sample whose turns have these lengths, with `between` tokens of an environment after each."""
    sample = Sample.begin(Prompt("a:0", "a", text="?", tokens=[1, 2, 3]), id=0, group_id=0)
    for length in turns:
        start = len(sample.tokens)
        sample.append([7] * length, {LOSS_MASK: 1})
        sample.turns.append(Turn(start, start + length, "stop"))
        sample.append([8] * between)
    sample.max_new_tokens = limit
    return sample


def score(sample, **options):
    group = Group(0, sample.prompt, [sample])
    return asyncio.run(SoftOverlong(SoftOverlongOptions(**options)).score_group(group))[0]


def penalty(*turns, limit=None, between=0, **options):
    return score(sample_of(*turns, limit=limit, between=between), **options)["reward"]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0), (1, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1), (30000, -1)],
)
def test_the_numbers_of_the_paper(length, expected):
    assert penalty(length, limit=20480) == expected
    assert penalty(length, buffer_len=4096, max_len=20480) == expected


def test_samples_of_one_trajectory_get_the_penalty_of_its_longest_turn():
    samples = [sample_of(length, limit=10) for length in (9, 10, 3)]
    samples[2].rollout_id = 1
    reward = SoftOverlong(SoftOverlongOptions(buffer_len=4))
    scores = asyncio.run(reward.score_group(Group(0, samples[0].prompt, samples)))
    assert [score["reward"] for score in scores] == [-1, -1, 0]
    assert [score["overlong"] for score in scores] == [1, 1, 0]


def test_the_factor_scales_it():
    assert penalty(8, limit=10, buffer_len=4, factor=0.5) == -0.25


def test_a_limit_of_its_own_goes_before_that_of_the_task_set():
    assert penalty(8, limit=100, buffer_len=4, max_len=10) == -0.5


def test_the_longest_turn_counts_and_what_the_environment_says_does_not():
    assert penalty(8, 9, 3, limit=10, buffer_len=4) == -0.75
    assert penalty(6, 6, 6, 6, limit=10, buffer_len=4) == 0
    assert penalty(6, 6, limit=10, buffer_len=4, between=50) == 0


def test_a_generate_function_that_writes_no_turns_is_judged_by_what_the_model_said():
    sample = sample_of(4, 4, between=5, limit=10)
    sample.turns = []
    assert score(sample, buffer_len=4)["reward"] == -0.5


def test_the_share_of_long_responses_is_a_part():
    assert [score(sample_of(n, limit=10), buffer_len=4)["overlong"] for n in (6, 7, 10)] == [0, 1, 1]


def test_a_sample_without_a_limit_is_refused():
    with pytest.raises(ConfigError, match="give max_len"):
        penalty(3)


@given(st.integers(0, 5000), st.integers(2, 4000), st.data())
def test_it_is_verls_formula_and_never_below_minus_the_factor(length, limit, data):
    buffer, factor = data.draw(st.integers(1, limit - 1)), data.draw(st.floats(0.01, 10))
    exceeding = length - (limit - buffer)
    verl = min(-exceeding / buffer * factor, 0)
    assert penalty(length, limit=limit, buffer_len=buffer, factor=factor) == pytest.approx(max(verl, -factor))
