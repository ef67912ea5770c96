"""Every way to say who teaches."""

import pytest

from miles.config.faults import ConfigFaults
from miles.config.teacher import as_named


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("org/model", {"default": "org/model"}),
        ("policy", {"default": "policy"}),
        ("http://host:30000/?key=1", {"default": "http://host:30000/?key=1"}),
        ("math=org/model", {"math": "org/model"}),
        (["math=http://a:1", "code=http://b:2"], {"math": "http://a:1", "code": "http://b:2"}),
        ({"math": "x"}, {"math": "x"}),
        (None, {}),
    ],
)
def test_places_with_and_without_names(given, meant):
    assert as_named(given) == meant


def test_two_of_one_name_are_refused():
    for places in (["x", "y"], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match="two teachers are called"):
            as_named(places)


def test_on_the_command_line(solve):
    words = ["--advantage-terms", "taught", "--opd-teacher-urls", "math=http://a:1", "code=http://b:2"]
    assert solve((), *words).config.teacher.urls == {"math": "http://a:1", "code": "http://b:2"}
    words = ["--advantage-terms", "taught", "--opd-teacher-urls", "http://a:1,http://b:2"]
    assert solve((), *words).config.teacher.urls == {"default": "http://a:1,http://b:2"}
    words = ["--advantage-terms", "taught", "--opd-teacher-load", "/models/m"]
    assert solve((), *words).config.teacher.load == {"default": "/models/m"}


def test_options_of_an_engine_that_nobody_named_are_answered(solve):
    words = ["--advantage-terms", "taught", "--opd-teacher-urls", "http://y:1", "--teacher.engine.max_running=5"]
    said = r"teacher.engine = '' .*\(--teacher.engine.max_running\)\n *has options and no `name`; installed:"
    with pytest.raises(ConfigFaults, match=said):
        solve((), *words)


def test_an_estimator_is_no_term_beside_itself(solve):
    words = ["--advantage-estimator", "taught", "--advantage-terms", "taught", "--opd-teacher-load", "m"]
    with pytest.raises(ConfigFaults, match="'taught' is the estimator and a term beside it too: it counts twice"):
        solve((), *words)
