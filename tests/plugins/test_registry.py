"""Names to components, options, and objects held against their protocols."""

import functools
from dataclasses import dataclass, field

import pytest
from pydantic import BaseModel, Field, model_validator

from miles.api import AdvantageInputs
from miles.config import Spec
from miles.errors import ConfigError, HookError, PluginConflictError, PluginLoadError, UnknownNameError
from miles.kinds import KINDS
from miles.options import read_options
from miles.plugins import load_plugins
from miles.registry import Registry

PARTS = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Options:
        bonus: float = 0.5
        size: int = 3

        def __post_init__(self):
            if self.size < 0:
                raise ValueError("size must not be negative")

    class Judge:
        def __init__(self, options):
            self.options = options

        async def score(self, sample):
            return self.options.bonus

    class Mute:
        pass

    class Slow:
        async def reset(self, prompt): ...
        def step(self, action): ...
        async def close(self): ...

    def estimator(inputs, *, options):
        return options.bonus

    def no_options(inputs):
        return 1

    def two(inputs, more):
        return 2

    def annotated(sample, *, options: Options):
        return options.size
"""

PLUGIN = """
    from miles.api import Component, hookimpl
    from parts_of_x import Options

    @hookimpl
    def miles_register_rewards():
        return {"judge": Component("parts_of_x:Judge", options=Options), "mute": Component("parts_of_x:Mute"),
                "gone": Component("parts_of_x:Gone"), "lost": Component("no_such_module_at_all:Gone"),
                "forgetful": Component("parts_of_x:Judge")}

    @hookimpl
    def miles_register_environments():
        return {"slow": Component("parts_of_x:Slow")}

    @hookimpl
    def miles_register_advantage_estimators():
        return {"plain": Component("parts_of_x:no_options"), "half": Component("parts_of_x:estimator", options=Options),
                "two": Component("parts_of_x:two"), "unbound": Component("parts_of_x:no_options", options=Options)}
"""


@pytest.fixture
def registry(install):
    install("miles-x", {"x": PLUGIN}, modules={"parts_of_x": PARTS})
    return Registry(load_plugins())


def test_a_class_gets_its_options(registry):
    judge = registry.build("rewards", Spec(name="judge", options={"bonus": "0.25"}))
    assert judge.options.bonus == 0.25
    assert judge.options.size == 3


def test_a_function_gets_its_options_as_a_keyword(registry):
    estimator = registry.build("advantage_estimators", Spec(name="half"))
    assert isinstance(estimator, functools.partial)
    assert estimator(None) == 0.5
    assert registry.build("advantage_estimators", Spec(name="plain"))(None) == 1


def test_unknown_names_are_answered_with_what_is_there(registry, monkeypatch):
    with pytest.raises(UnknownNameError, match=r"no installed plugin offers the reward 'jugde'.*did you mean 'judge'"):
        registry.component("rewards", "jugde")
    monkeypatch.setattr("miles.catalog.PROVIDERS", {"rewards": {"miles-oracle": ("oracle",)}})
    with pytest.raises(UnknownNameError, match="planned as miles-oracle, which is not in this version"):
        registry.component("rewards", "oracle")
    monkeypatch.setattr("miles.registry.MADE", {"miles-oracle"})
    with pytest.raises(UnknownNameError, match="pip install miles-oracle"):
        registry.component("rewards", "oracle")
    with pytest.raises(UnknownNameError, match="no kind of component"):
        registry.component("reward", "judge")
    with pytest.raises(UnknownNameError, match=r"the IS correction 'tsi'; did you mean 'tis'\? installed: "):
        registry.component("is_corrections", "tsi")


def test_bad_options_are_all_reported_without_importing_the_target(registry):
    with pytest.raises(ConfigError) as caught:
        registry.build("rewards", Spec(name="judge", options={"bonos": 1, "size": "many"}))
    for words in ("bonos", "did you mean 'bonus'", "size='many'", "valid integer"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="must not be negative"):
        registry.build("rewards", Spec(name="judge", options={"size": -1}))
    with pytest.raises(ConfigError, match="takes no options"):
        registry.build("rewards", Spec(name="lost", options={"size": 1}))  # its module does not exist
    assert registry.check("rewards", "lost", {}) == []


@dataclass(frozen=True)
class Confident:
    words: tuple[str, ...] = field(default=(), repr=False)
    size: int = 3

    def __post_init__(self):
        if self.size > 9:
            raise ValueError("too many")


class ConfidentModel(BaseModel):
    words: tuple[str, ...] = Field((), repr=False)
    size: int = 3

    @model_validator(mode="after")
    def _few(self):
        if self.size > 9:
            raise ValueError("too many")
        return self


@pytest.mark.parametrize("kind", [Confident, ConfidentModel])
def test_what_a_field_does_not_show_no_error_repeats(kind):
    given = {"words": {"a": "sesame"}, "word": "sesame", "size": "many"}
    _, faults = read_options(kind, given)
    assert "sesame" not in f"{faults} {' '.join(map(str, faults))}"
    told = [str(fault).partition(":")[0] for fault in faults]
    assert told == ["word=<class 'str'>", "words=<class 'dict'>", "size='many'"]
    _, (together,) = read_options(kind, {"words": ["sesame"], "size": 10})
    assert (together.key, together.value, together.problem) == ("", {"words": list, "size": 10}, "too many")


@pytest.mark.parametrize(("name", "word"), [("gone", "no attribute 'Gone'"), ("lost", "no_such_module_at_all")])
def test_targets_that_cannot_be_imported(registry, name, word):
    with pytest.raises(PluginLoadError, match=word) as caught:
        registry.build("rewards", Spec(name=name))
    assert f"reward '{name}' of plugin 'x' of miles-x 1.0" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("rewards", "mute", ["cannot judge", "`score(sample)`", "(sample) -> float"]),
        ("rewards", "forgetful", ["Target()", "options"]),
        ("environments", "slow", ["miles.protocols.Environment", "`step` must be `async def`"]),
        ("advantage_estimators", "two", ["called with (inputs)", "more"]),
        ("advantage_estimators", "unbound", ["no parameter 'options'"]),
    ],
)
def test_what_is_not_of_its_kind_is_refused(registry, kind, name, words):
    with pytest.raises(HookError) as caught:
        registry.build(kind, Spec(name=name))
    for word in (*words, "miles-x 1.0"):
        assert word in str(caught.value)


def test_module_paths_are_built_and_checked_like_any_component(registry):
    assert registry.build("rewards", Spec(name="parts_of_x:annotated", options={"size": 7}))(None) == 7
    with pytest.raises(ConfigError, match="valid integer"):
        registry.build("rewards", Spec(name="parts_of_x:annotated", options={"size": "x"}))
    with pytest.raises(HookError, match="parts_of_x:Mute"):
        registry.build("rewards", Spec(name="parts_of_x:Mute"))
    with pytest.raises(PluginLoadError, match="no attribute 'anotated'; did you mean 'annotated'"):
        registry.build("rewards", Spec(name="parts_of_x:anotated"))


def test_a_reward_that_judges_groups_is_asked_for_groups(registry):
    """Also one that could judge single samples: the check looks at what will be called."""

    class Both:
        def score(self, sample, odd): ...
        def score_group(self, group): ...

    class Wrong(Both):
        def score_group(self): ...

    registry.add("rewards", "both", Both())
    registry.add("rewards", "wrong_both", Wrong())
    registry.build("rewards", Spec(name="both"))
    with pytest.raises(HookError, match=r"`score_group` is called with \(group\)"):
        registry.build("rewards", Spec(name="wrong_both"))


def test_a_reward_in_the_form_of_slime_is_told_so(registry):
    async def slime_reward(args, sample, **kwargs):
        return 1.0

    def other(sample, scale):
        return 1.0

    registry.add("rewards", "slime_reward", slime_reward)
    registry.add("rewards", "other", other)
    with pytest.raises(
        HookError, match=r"slime_reward\(args, sample, \*\*kwargs\); write `\(sample\) -> float`.*form of slime"
    ):
        registry.build("rewards", Spec(name="slime_reward"))
    with pytest.raises(HookError, match=r"other\(sample, scale\); write `\(sample\) -> float`$"):
        registry.build("rewards", Spec(name="other"))


def test_a_module_written_with_a_dot_is_told_the_colon(registry):
    with pytest.raises(UnknownNameError, match="with a colon: my_module:my_reward"):
        registry.component("rewards", "my_module.my_reward")


def test_objects_given_in_python(registry):
    def mine(sample):
        return 3.0

    registry.add("rewards", "mine", mine)
    registry.add("rewards", "mine", mine)
    assert registry.build("rewards", Spec(name="mine")) is mine
    with pytest.raises(PluginConflictError, match="mine"):
        registry.add("rewards", "mine", lambda sample: 0)
    registry.add("rewards", "wrong", lambda: 0)
    with pytest.raises(HookError, match=r"called with \(sample\)"):
        registry.build("rewards", Spec(name="wrong"))


def test_a_name_claimed_twice_is_an_error_where_it_is_used(install):
    source = """
        from miles.api import Component, hookimpl

        @hookimpl
        def miles_register_rewards():
            return {"same": Component("%s:f"), "other%s": Component("a:b")}
    """
    install("miles-one", {"one": source % ("json", 1)})
    install("miles-two", {"two": source % ("math", 2)})
    registry = Registry(load_plugins())
    assert registry.component("rewards", "other1").target == "a:b"
    with pytest.raises(PluginConflictError, match="write miles-one/same or miles-two/same"):
        registry.component("rewards", "same")
    assert registry.component("rewards", "miles-two/same").target == "math:f"
    assert len(registry.conflicts()) == 1


def test_words_of_the_core_are_no_components(registry):
    assert registry.check("is_corrections", "none", {}) == []
    [fault] = registry.check("is_corrections", "none", {"clip": 2})
    assert "takes no options" in fault.problem
    with pytest.raises(ConfigError, match="choice made by the core"):
        registry.build("is_corrections", Spec(name="none"))


def test_every_kind_has_a_hook_and_every_registration_hook_a_kind():
    from miles import hookspecs

    hooks = {n.removeprefix("miles_register_") for n in vars(hookspecs) if n.startswith("miles_register_")}
    assert hooks == set(KINDS)


def test_the_context_is_a_keyword(registry):
    class Source:
        def __init__(self, *, context):
            self.context = context

        def __len__(self):
            return 0

        def next_prompts(self, count): ...
        def every_prompt(self): ...
        def state_dict(self): ...
        def load_state_dict(self, state): ...

    registry.add("data_sources", "mine", Source)
    assert registry.build("data_sources", Spec(name="mine"), context="the context").context == "the context"
    with pytest.raises(HookError, match="context"):
        registry.build("data_sources", Spec(name="mine"))


def test_advantage_estimators_may_be_objects_with_call(registry):
    class Constant:
        def __call__(self, inputs: AdvantageInputs):
            return 1

    registry.add("advantage_estimators", "constant", Constant())
    assert registry.build("advantage_estimators", Spec(name="constant"))(None) == 1
