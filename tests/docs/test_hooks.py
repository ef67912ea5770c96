"""docs/hooks.md says everything of every hook, and nothing of others; its examples are plugins that load."""

import inspect
import re
import types
from pathlib import Path

import pytest

from miles import hookspecs
from miles.component import Component
from miles.kinds import KINDS
from miles.plugins import load_plugins

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
HOOKS = {
    name: [*inspect.signature(function).parameters]
    for name, function in vars(hookspecs).items()
    if name.startswith("miles_")
}
SECTIONS = dict(re.findall(r"^### (\w+)\([^)\n]*\)$(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


def example_of(section):
    [code] = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return code


def test_headings_are_the_hooks_with_their_arguments_in_call_order():
    headings = re.findall(r"^### (\w+)\((.*)\)$", PAGE, flags=re.MULTILINE)
    assert [(name, [a for a in arguments.split(", ") if a]) for name, arguments in headings] == [*HOOKS.items()]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_section_says_what_each_argument_is_and_since_when(hook):
    section = SECTIONS[hook]
    assert "Since API 1." in section
    assert re.findall(r"^- `(\w+)`:", section, flags=re.MULTILINE) == HOOKS[hook]
    if HOOKS[hook]:
        assert re.search(r"\bIn (the driver|every worker)\b", section.replace("\n", " ")), "which process?"
        assert re.search(r"^Returns? ", section, flags=re.MULTILINE), "what is returned?"
        assert re.search(r"Read only|edit in place", section), "may it mutate?"


@pytest.mark.parametrize("hook", HOOKS)
def test_its_example_is_a_plugin_that_loads(hook):
    """As `miles` loads one: misspelt hooks, missing markers and unknown arguments are errors."""
    plugin = types.ModuleType(f"example_of_{hook}")
    exec(compile(example_of(SECTIONS[hook]), f"docs/hooks.md ({hook})", "exec"), plugin.__dict__)
    plugins = load_plugins(extra=[plugin])
    implementations = getattr(plugins.manager.hook, hook).get_hookimpls()
    assert plugin in [each.plugin for each in implementations]
    offered = [each for each in plugins.registrations if each.plugin.name == plugin.__name__]
    if hook.startswith("miles_register_"):
        assert [each.kind for each in offered] == [hook.removeprefix("miles_register_")]
        assert all(isinstance(each.value, Component | dict) for each in offered)
    else:
        assert offered == []


def test_the_table_of_kinds_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, flags=re.MULTILINE)
    expected = [
        (
            kind.name,
            ", ".join(f"`{key}`" for key in kind.keys),
            f"`{kind.protocol.__name__}`" if kind.protocol else "a config overlay",
            ", ".join(f"`{word}`" for word in kind.words),
        )
        for kind in KINDS.values()
    ]
    assert rows == expected


def test_the_fields_of_a_component_are_listed():
    listed = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \|$", PAGE, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(listed)) == [*Component.__dataclass_fields__]


def test_the_overview_lists_every_lifecycle_hook():
    overview = PAGE.partition("## Lifecycle hooks")[2].partition("###")[0]
    named = re.findall(r"^ {4,}(miles_\w+)", overview, flags=re.MULTILINE)
    assert set(named) == {hook for hook in HOOKS if not hook.startswith("miles_register_")}


def test_links_lead_somewhere():
    docs = Path(__file__).parents[2] / "docs"
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (docs / target).exists(), target
