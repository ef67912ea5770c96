"""Flags that select the component which declares them: `--use-weighting` for `--is-correction weighting`."""

import pytest

from miles.config.faults import ConfigFaults

WEIGHTING = {"algorithm": {"is_correction": {"name": "weighting", "low": 0.7}}}


def spec_of(resolved):
    spec = resolved.config.algorithm.is_correction
    return spec.name, spec.options


def test_a_flag_selects_its_component(solve):
    resolved = solve((), "--use-weighting")
    assert spec_of(resolved) == ("weighting", {})
    assert str(resolved.origin("algorithm.is_correction.name")) == "--use-weighting"
    assert spec_of(solve((), "--weighting-low", "3", "--use-weighting")) == ("weighting", {"low": 3.0})
    assert spec_of(solve((), "--use-weighting=true")) == ("weighting", {})


def test_python_takes_it_too(solve):
    resolved = solve((), overrides={"use_weighting": True, "weighting_low": 0.1})
    assert spec_of(resolved) == ("weighting", {"low": 0.1})
    assert str(resolved.origin("algorithm.is_correction.name")) == "use_weighting, given in Python"


def test_options_that_a_file_gives_are_kept(solve):
    resolved = solve((WEIGHTING,), "--use-weighting")
    assert spec_of(resolved) == ("weighting", {"low": 0.7})
    [plugin] = [offer.plugin for offer in resolved.registry.offers("is_corrections") if offer.name == "weighting"]
    full = {"algorithm": {"is_correction": {"name": f"{plugin.distribution}/weighting", "low": 0.7}}}
    assert spec_of(solve((full,), "--use-weighting"))[1] == {"low": 0.7}


def test_a_layer_above_decides(solve):
    assert spec_of(solve((WEIGHTING,), "--use-rejecting")) == ("rejecting", {})
    assert spec_of(solve((), "--use-weighting", overrides={"is_correction": "rejecting"})) == ("rejecting", {})


@pytest.mark.parametrize("words", [["--no-use-weighting"], ["--use-weighting", "false"], ["--use-weighting=off"]])
def test_its_contrary_brings_the_default_back(solve, words):
    assert spec_of(solve((WEIGHTING,), *words)) == ("none", {})
    assert spec_of(solve((), *words)) == ("none", {})
    rejecting = {"algorithm": {"is_correction": "rejecting"}}
    assert spec_of(solve((rejecting,), *words)) == ("rejecting", {})
    assert spec_of(solve((WEIGHTING,), overrides={"use_weighting": False})) == ("none", {})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--use-weighting", "--is-correction", "rejecting"], r"is 'rejecting' \(--is-correction\)"),
        (["--algorithm.is_correction=rejecting", "--use-weighting"], r"is 'rejecting' \(--algorithm"),
        (["--use-weighting", "--is-correction", "none"], r"is 'none'"),
    ],
)
def test_naming_another_component_beside_it_is_one_fault(solve, words, problem):
    with pytest.raises(ConfigFaults, match=problem) as raised:
        solve((), *words)
    [fault] = raised.value.faults
    assert fault.key == "--use-weighting"
    assert "selects 'weighting', but algorithm.is_correction" in fault.problem
    assert fault.remedy == "give one of the two"


def test_two_flags_that_select_different_components_contradict_each_other(solve):
    with pytest.raises(ConfigFaults, match=r"selects 'rejecting', but .* is 'weighting' \(--use-weighting\)"):
        solve((), "--use-weighting", "--use-rejecting")
    with pytest.raises(ConfigFaults, match="selects 'weighting', but"):
        solve((), overrides={"use_weighting": True, "algorithm": {"is_correction": "rejecting"}})


def test_naming_the_same_one_is_fine(solve):
    words = "--use-weighting", "--is-correction", "{name: weighting, low: 0.4}"
    assert spec_of(solve((), *words)) == ("weighting", {"low": 0.4})
    assert spec_of(solve((), *words[1:], words[0])) == ("weighting", {"low": 0.4})


def test_an_option_without_its_component_says_how_to_select_it(solve):
    with pytest.raises(ConfigFaults, match=r"fix: set algorithm.is_correction to weighting \(--use-weighting\), or"):
        solve((), "--weighting-low", "3")


def test_a_value_that_is_no_switch_is_refused(solve):
    with pytest.raises(ConfigFaults, match=r"--use-weighting = 'much'[^\n]*\n.*must be true or false"):
        solve((), "--use-weighting=much")
    with pytest.raises(ConfigFaults, match="must be true or false"):
        solve((), overrides={"use_weighting": 3})


def filters_of(resolved):
    return [(spec.name, spec.options) for spec in resolved.config.rollout.filters]


def test_in_a_list_it_is_added_once(solve):
    listed = {"rollout": {"filters": ["agreeing_rewards", {"name": "sieve", "low": 0.5}]}}
    assert filters_of(solve((), "--use-sieve", "--use-sieve")) == [("sieve", {})]
    other = {"rollout": {"filters": ["agreeing_rewards"]}}
    resolved = solve((other,), "--use-sieve")
    assert filters_of(resolved) == [("agreeing_rewards", {}), ("sieve", {})]
    assert str(resolved.origin("rollout.filters.1")) == "--use-sieve"
    assert str(resolved.origin("rollout.filters.0")) == "given in Python"
    for order in (["--use-sieve", "--rollout-filters", "agreeing_rewards"],
                  ["--rollout-filters", "agreeing_rewards", "--use-sieve"]):  # fmt: skip
        assert [name for name, _ in filters_of(solve((), *order))] == ["agreeing_rewards", "sieve"]
    assert filters_of(solve((listed,), "--use-sieve"))[1] == ("sieve", {"low": 0.5})
    assert filters_of(solve((listed,), "--no-use-sieve")) == [("agreeing_rewards", {})]


def test_a_kind_with_two_places_goes_where_the_component_says(solve):
    algorithm = solve((), "--use-pull").config.algorithm
    assert [spec.name for spec in algorithm.advantage_terms] == ["pull"]
    assert algorithm.advantage_estimator.name == "grpo"


def test_a_flag_with_a_value_selects_too_where_the_component_says_so(solve):
    words = ["--eval-prompt-data", "held_out", "test.jsonl", "--chatty-low", "2", "--scale-low", "3"]
    resolved = solve((), *words)
    (trained,), (held_out,) = resolved.config.data.sets, resolved.config.eval.sets
    for task_set in (trained, held_out):
        assert (task_set.generate.name, task_set.generate.options) == ("chatty", {"low": 2.0})
        assert [(reward.name, reward.options) for reward in task_set.reward] == [("one", {}), ("scaled", {"low": 3.0})]
    assert str(resolved.origin("data.sets.default.generate.name")) == "--chatty-low"
    same = solve((), overrides={"chatty_low": 2, "scale_low": 3}).config.data.sets[0]
    assert (same.generate, same.reward) == (trained.generate, trained.reward)


@pytest.mark.parametrize("selecting", [["--use-weighting"], ["--is-correction", "weighting"]])
def test_options_of_the_same_command_stay_whichever_comes_first(solve, selecting):
    low = "--algorithm.is_correction.low=3"
    assert spec_of(solve((), low, *selecting)) == spec_of(solve((), *selecting, low)) == ("weighting", {"low": 3.0})
    assert spec_of(solve((WEIGHTING,), "--is-correction", "rejecting")) == ("rejecting", {})


def test_its_other_flags_do_not_select(solve):
    with pytest.raises(ConfigFaults, match="--scale-on") as raised:
        solve((), "--scale-on")
    assert "add scaled to data.sets.*.reward (--scale-low)" in str(raised.value)
