"""Checks are kept apart: one that crashes is a finding itself."""

from functools import partial

from miles.diagnosis.finding import Finding, examine


def good(name="fine"):
    yield Finding(name, "ok", "well")


def breaks_late():
    yield Finding("first", "ok", "well")
    raise ZeroDivisionError("nothing to divide by")


def breaks_at_once(_):
    raise OSError("no such thing")


def lacks():
    raise ModuleNotFoundError("No module named 'pydantic'")


def test_a_missing_library_is_no_mistake_of_miles():
    (found,) = examine("all", lacks).findings
    assert found.remedy == "install what it lacks"


def test_a_crash_is_a_line_and_the_rest_goes_on():
    section = examine("all", good, breaks_late, partial(breaks_at_once, 1), partial(good, "last"))
    assert [finding.name for finding in section.findings] == ["fine", "first", "breaks_late", "breaks_at_once", "last"]
    assert [finding.mark for finding in section.findings] == ["ok", "ok", "fault", "fault", "ok"]
    crash = section.findings[2]
    assert "ZeroDivisionError: nothing to divide by" in crash.found
    assert "test_finding.py:" in crash.found
    assert crash.stops == ()
