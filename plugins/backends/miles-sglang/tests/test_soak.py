"""Many requests on a bad day: every sample comes to one end, and the accounts of all who took part agree."""

import asyncio
import copy

import pytest
import soak
from faults import HARMLESS, PASSING

from miles.types import Status


@pytest.fixture(scope="module")
def day():
    """A short one, so bad that some samples fail."""
    return asyncio.run(soak.soak(soak.Weather(requests=160, share=0.45, retries=1, timeout=2.0)))


def test_a_short_day(day):
    assert soak.complaints(day) == []
    statuses = {sample.status for sample in day.ended}
    assert Status.FAILED in statuses
    assert Status.TRUNCATED in statuses
    assert len(day.ended) >= 160
    assert sum(day.faults.values()) > 80


@pytest.mark.slow
def test_ten_thousand_requests():
    day = asyncio.run(soak.soak(soak.Weather()))
    assert soak.complaints(day) == []
    assert len(day.ended) >= 10_000
    assert set(day.faults) == {*PASSING, *HARMLESS}
    assert 0 < sum(sample.status is Status.FAILED for sample in day.ended) < 100
    assert day.counts["retries"] > 2000


@pytest.fixture
def altered(day):
    """`altered(change)`: what is complained of when the accounts of that day are changed."""

    def complaints(change):
        changed = copy.deepcopy(day)
        change(changed)
        return "\n".join(soak.complaints(changed))

    return complaints


def of(day, *statuses):
    return next(sample for sample in day.ended if sample.status in statuses)


def test_a_sample_that_is_lost_or_doubled_is_noticed(altered):
    assert "started 1 times and ended 0 times" in altered(lambda day: day.ended.remove(of(day, Status.TRUNCATED)))
    assert "ended 2 times" in altered(lambda day: day.ended.append(of(day, Status.TRUNCATED)))


def test_a_sample_that_failed_without_a_cause_is_noticed(altered):
    def fails(day):
        of(day, Status.TRUNCATED).status = Status.FAILED

    def is_given_up(day):
        day.seeds[of(day, Status.FAILED).id].pop()

    assert "failed, although it was answered" in altered(fails)
    assert "failed after 1 attempts of 2" in altered(is_given_up)


def test_tokens_of_others_are_noticed(altered):
    def takes(day):
        of(day, Status.TRUNCATED).tokens[-1] += 1

    def has_none(day):
        of(day, Status.FAILED).status = Status.COMPLETED

    assert "holds another's answer" in altered(takes)
    assert "with [0, 0] answers" in altered(has_none)
    assert "undisturbed" in altered(lambda day: day.disturbed.append(3))


def test_what_is_generated_twice_or_left_behind_is_noticed(altered):
    def works_twice(day):
        day.generated[next(iter(day.records.values())).rids[0]] = 2

    assert "was worked on 2 times" in altered(works_twice)
    assert "2 requests were still running" in altered(lambda day: setattr(day, "left", 2))
