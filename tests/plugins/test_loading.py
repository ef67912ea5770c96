"""Discovery, faults that name their plugin, blocking, requirements, provenance."""

import types

import pytest

from miles.api import Component, hookimpl
from miles.errors import HookError, PluginConflictError, PluginError, PluginLoadError
from miles.plugins import compare_provenance, load_plugins

GOOD = """
    from miles.api import Component, hookimpl
    MILES_API = 1

    @hookimpl
    def miles_register_rewards():
        return {"sunny": Component("nowhere:Sunny", summary="always 1")}
"""


def test_a_plugin_is_found_by_its_entry_point(install):
    install("miles-sunny", {"sunny": GOOD}, version="2.3")
    plugins = load_plugins()
    info = plugins.infos["sunny"]
    assert (info.distribution, info.version, info.api) == ("miles-sunny", "2.3", 1)
    entry = next(e for e in plugins.provenance() if e["name"] == "sunny")
    assert entry["components"] == {"rewards": ["sunny"]}


def test_builtins_come_through_the_same_hooks():
    builtin = next(e for e in load_plugins().provenance() if e["name"] == "builtin")
    assert {"fsdp"} == set(builtin["components"]["train_backends"])
    assert "ppo_clip" in builtin["components"]["policy_losses"]


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("import not_a_module_of_anybody", PluginLoadError, ["cannot", "not_a_module_of_anybody"]),
        ("MILES_API = 99", PluginLoadError, ["API 99", "API 1", "-p no:broken"]),
        (
            "from miles.api import hookimpl\n@hookimpl\ndef miles_register_reward():\n    return {}",
            HookError,
            ["miles_register_reward is no hook", "did you mean miles_register_rewards?"],
        ),
        ("def miles_on_run_start(run):\n    pass", HookError, ["miles_on_run_start", "@hookimpl"]),
        (
            "from miles.api import hookimpl\n@hookimpl\ndef miles_on_run_start(runn):\n    pass",
            HookError,
            ["runn"],
        ),
        (
            "from miles.api import hookimpl\n@hookimpl\ndef miles_register_rewards():\n    return ['sunny']",
            HookError,
            ["list", "mapping"],
        ),
        (
            "from miles.api import hookimpl\n@hookimpl\ndef miles_register_rewards():\n    return {'sunny': 3}",
            HookError,
            ["'sunny'", "int", "Component"],
        ),
        (
            "from miles.api import hookimpl, Component\n@hookimpl\ndef miles_register_rewards():\n"
            "    return {'a/b': Component('x:y')}",
            HookError,
            ["'a/b'"],
        ),
        (
            "from miles.api import hookimpl\n@hookimpl\ndef miles_register_rewards():\n    return 1 / 0",
            PluginLoadError,
            ["ZeroDivisionError"],
        ),
    ],
    ids=["import", "api", "misspelt", "unmarked", "arguments", "list", "not a component", "name", "raises"],
)
def test_a_broken_plugin_is_one_clear_error(install, source, error, words):
    install("miles-broken", {"broken": source}, version="0.7")
    with pytest.raises(error) as caught:
        load_plugins()
    message = str(caught.value)
    for word in ("'broken'", "miles-broken", "0.7", *words[1:]):
        assert word in message
    assert caught.value.exit_code == 2


def test_one_broken_plugin_does_not_hide_the_others(install):
    install("miles-broken", {"broken": "1 / 0", "lost": "import not_a_module_of_anybody"})
    install("miles-sunny", {"sunny": GOOD})
    plugins = load_plugins(strict=False)
    assert len(plugins.faults) == 2
    assert "sunny" in plugins.infos
    assert "broken" not in plugins.infos
    with pytest.raises(PluginLoadError, match=r"(?s)'broken'.*'lost'"):
        load_plugins()


def test_different_faults_are_raised_together(install):
    install("miles-broken", {"broken": "1 / 0", "old": "MILES_API = 0"})
    with pytest.raises(PluginError) as caught:
        load_plugins(require=["miles-absent"])
    for word in ("ZeroDivisionError", "API 0", "miles-absent"):
        assert word in str(caught.value)


def test_two_distributions_may_not_claim_one_plugin_name(install):
    install("miles-one", {"twin": GOOD})
    install("miles-two", {"twin": GOOD})
    with pytest.raises(PluginConflictError, match="twin") as caught:
        load_plugins()
    assert "miles-one 1.0" in str(caught.value)
    assert "miles-two 1.0" in str(caught.value)
    assert "twin" not in load_plugins(block=["twin"]).infos
    assert load_plugins(block=["miles-one"]).infos["twin"].distribution == "miles-two"


def test_blocking_by_plugin_or_by_distribution(install):
    install("miles-sunny", {"sunny": GOOD})
    for name in ("sunny", "miles-sunny"):
        assert "sunny" not in load_plugins(block=[name]).infos
    install("miles-broken", {"broken": "1 / 0"})
    assert "sunny" in load_plugins(block=["broken"]).infos


@pytest.mark.parametrize(
    ("wish", "word"),
    [("miles-sunny>=3", "1.0"), ("miles-absent", "not installed"), ("miles sunny!", "no requirement")],
)
def test_requirements_that_are_not_met(install, wish, word):
    install("miles-sunny", {"sunny": GOOD})
    with pytest.raises(PluginConflictError, match=word) as caught:
        load_plugins(require=[wish])
    assert wish in str(caught.value)


def test_requirements_that_are_met(install):
    install("miles-sunny", {"sunny": GOOD})
    load_plugins(require=["miles-sunny>=1,<2", "Miles_Sunny", "miles-absent; python_version < '3'"])


def test_a_blocked_plugin_does_not_satisfy_a_requirement(install):
    install("miles-sunny", {"sunny": GOOD})
    with pytest.raises(PluginConflictError, match="blocked"):
        load_plugins(block=["sunny"], require=["miles-sunny"])


def test_modules_given_in_python():
    module = types.ModuleType("mine")
    calls = []

    @hookimpl
    def miles_on_run_start(run):
        calls.append(run)

    @hookimpl
    def miles_register_rewards():
        return {"mine": Component("mine:reward")}

    module.miles_on_run_start, module.miles_register_rewards = miles_on_run_start, miles_register_rewards
    plugins = load_plugins(extra=[module])
    plugins.hook.miles_on_run_start(run="a run")
    assert calls == ["a run"]
    assert any(r.name == "mine" and r.plugin.distribution == "(given in Python)" for r in plugins.registrations)


def test_an_error_in_a_hook_names_the_plugin_that_raised_it(install):
    source = "from miles.api import hookimpl\n@hookimpl\ndef miles_on_run_start(run):\n    raise KeyError('moon')"
    install("miles-moody", {"moody": source})
    install("miles-sunny", {"sunny": source.replace("raise KeyError('moon')", "pass")})
    with pytest.raises(KeyError) as caught:
        load_plugins().hook.miles_on_run_start(run=None)
    assert caught.value.__notes__ == ["raised in hook miles_on_run_start of plugin 'moody' of miles-moody 1.0"]


def test_workers_compare_provenance(install):
    install("miles-sunny", {"sunny": GOOD})
    plugins = load_plugins()
    plugins.verify(plugins.provenance())
    elsewhere = [{**e, "version": "9"} if e["name"] == "sunny" else e for e in plugins.provenance()]
    assert compare_provenance(elsewhere, plugins.provenance()) == ["sunny: version is '1.0', expected '9'"]
    with pytest.raises(PluginConflictError, match="expected '9'"):
        plugins.verify(elsewhere)
    fewer = [e for e in plugins.provenance() if e["name"] != "sunny"]
    assert compare_provenance(fewer, plugins.provenance()) == ["sunny: installed only here"]
    assert compare_provenance(plugins.provenance(), fewer) == ["sunny: not installed here"]
