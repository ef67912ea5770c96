"""What `auto` chooses: the component that says it is the one for the case at hand."""

import types
from types import SimpleNamespace

import pytest

from miles.api import Component, ConfigError, hookimpl
from miles.config import Config, Spec, TaskSet
from miles.modeling import automatic, bridge_for, generate_function_for, precision_for
from miles.plugins import load_plugins
from miles.registry import Registry


class Rivals(types.SimpleNamespace):
    """A plugin whose components claim something of their own, something of the built-in ones, and nothing."""

    __name__ = "rivals"

    @hookimpl
    def miles_register_chat_formats(self):
        return {
            "elvish": Component("parts:Elvish", provides=("elf", "both")),
            "dwarvish": Component("parts:Dwarvish", provides=("dwarf", "both")),
            "mute": Component("parts:Mute"),
        }

    @hookimpl
    def miles_register_generate_functions(self):
        return {"chatty": Component("parts:chatty", provides=("turns",))}


@pytest.fixture(scope="module")
def registry():
    return Registry(load_plugins(extra=[Rivals()]))


def chat_format(registry, name, *wanted):
    return automatic(registry, Spec(name=name, options={"a": 1}), "chat_formats", *wanted)


def test_the_first_that_somebody_provides(registry):
    assert chat_format(registry, "auto", "elf", "any").name == "elvish"
    assert chat_format(registry, "auto", "orc", "any").name == "template"
    assert chat_format(registry, "auto", "orc", "any").options == {"a": 1}
    assert chat_format(registry, "mute", "elf").name == "mute"


def test_two_claims_and_none_are_errors(registry):
    with pytest.raises(ConfigError, match=r"'both' is provided by 'dwarvish' .* and 'elvish'.*data\.chat_format"):
        chat_format(registry, "auto", "both", "any")
    with pytest.raises(ConfigError, match=r"no installed chat format provides 'orc' \(provided: any, both"):
        chat_format(registry, "auto", "orc")
    with pytest.raises(ConfigError, match=r"model\.bridge: no installed bridge provides 'orc'"):
        bridge_for(registry, Config(), SimpleNamespace(model_type="orc"))


def test_generate_functions_by_what_the_task_set_is(registry):
    plain = Registry(load_plugins())
    task = TaskSet(environment="maze")
    assert generate_function_for(plain, TaskSet(), generates=True).__name__ == "single_turn"
    assert type(generate_function_for(plain, task, generates=True)).__name__ == "MultiTurn"
    assert generate_function_for(plain, task, generates=False).__name__ == "dataset"
    assert generate_function_for(plain, TaskSet(generate="dataset"), generates=True).__name__ == "dataset"
    with pytest.raises(ConfigError, match="'turns' is provided by 'chatty'"):
        generate_function_for(registry, task, generates=True)


def test_a_precision_scheme_is_told_the_backend_by_its_name_in_the_config(registry):
    class Scheme:
        logprob_tolerance = 0.1
        told = ()

        def configure(self, backend, model_config):
            Scheme.told += ((backend, model_config),)

        def prepare(self, model): ...
        def autocast(self): ...
        def export(self, groups): ...
        def engine_options(self): ...

    registry.add("precision_schemes", "noted", Scheme)
    precision_for(registry, Config.model_validate({"precision": {"scheme": "noted"}, "train": {"dtype": "bf16"}}))
    assert Scheme.told == (("fsdp", {"dtype": "bf16"}),)
