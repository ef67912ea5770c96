"""The guard, excuses, and what holds for every kind, on plugins that are wrong in one way each."""

import subprocess
import sys

import pytest

from miles.kinds import KINDS
from miles.testing import CONTRACTS, PolicyLossContract, RewardContract, standard_tests
from miles.testing.contract import installed, modules_of_registering


def test_every_kind_has_a_contract():
    assert CONTRACTS.keys() == KINDS.keys()
    assert all(contract.kind == kind for kind, contract in CONTRACTS.items())


def test_every_standard_test_says_why():
    silent = [
        f"{contract.__name__}.{name}"
        for contract in CONTRACTS.values()
        for name, test in standard_tests(contract).items()
        if len(test.__doc__ or "") < 30
    ]
    assert silent == []


def test_miles_alone_needs_no_pytest():
    code = "import sys, miles, miles.api, miles.cli; assert not {'pytest', 'miles.testing'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------- the guard


def make(name="TestSft", bases=(PolicyLossContract,), **members):
    return type(name, bases, {"name": "sft", **members})


def mixin():
    return type("Mixin", (), {"test_metrics_are_detached": lambda self: None})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"test_metrics_are_detached": lambda self: None}, "takes the place of a standard test"),
        ({"test_metrics_are_detached": None}, "takes the place of a standard test"),
        ({"bases": (mixin(), PolicyLossContract)}, "takes the place of a standard test"),
        (
            {"skips": {"test_metrics_are_detachd": "why"}},
            "no standard test of it; they are .*test_packing",
        ),
        ({"skips": {"test_metrics_are_detached": " "}}, "gives no reason"),
        ({"expected_failures": {"test_metrics_are_detached": ""}}, "gives no reason"),
        ({"__test__": False}, "keeps pytest from collecting"),
        ({"__init__": lambda self: None}, "keeps pytest from collecting"),
        ({"name": "SftContract"}, "call it TestSftContract"),
    ],
)
def test_a_standard_test_cannot_be_lost_in_silence(members, message):
    with pytest.raises(TypeError, match=message):
        make(**members)


def test_a_subclass_of_a_test_class_is_guarded_too():
    with pytest.raises(TypeError, match="takes the place"):
        make("TestMore", (make(),), test_metrics_are_detached=lambda self: None)


def test_own_tests_and_hooks_are_welcome():
    cls = make(test_my_own=lambda self: None, inputs=PolicyLossContract.inputs)
    assert cls.test_my_own
    assert "test_my_own" not in standard_tests(cls)


def test_excuses_are_shown_by_pytest(tmp_path):
    (tmp_path / "test_excused.py").write_text(
        "from miles.testing import PolicyLossContract\n"
        "class TestSft(PolicyLossContract):\n"
        "    name = 'sft'\n"
        "    skips = {'test_metrics_are_detached': 'it has none, says the author'}\n"
        "    expected_failures = {'test_on_policy_it_is_the_policy_gradient': 'advantages play no part',\n"
        "                         'test_it_is_described': 'passes in truth'}\n"
    )
    command = [sys.executable, "-m", "pytest", "-rsx", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "it has none, says the author" in done.stdout
    assert "advantages play no part" in done.stdout
    assert "XPASS(strict)" in done.stdout
    assert "1 failed" in done.stdout
    assert "1 skipped" in done.stdout
    assert "1 xfailed" in done.stdout


# ------------------------------------------------------------------------------------------------- every kind's tests

PLUGIN = """
from dataclasses import dataclass
from miles.api import Component, hookimpl
MILES_API = 1
@dataclass(frozen=True)
class Options:
    scale: float = 1.0
@hookimpl
def miles_register_rewards():
    return {"found": Component("found_reward:Judge", options=Options, summary="Judges", flags={"--found": "scale"})}
"""
TARGET = """
class Judge:
    def __init__(self, options):
        if options.scale < 0:
            raise __import__("miles.errors").errors.ConfigError("scale must not be negative")
    def score(self, sample):
        return 0.0
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """`failing(plugin source, target source)`: names of the standard tests that fail on the reward `found`."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def forget():
        installed.cache_clear()
        modules_of_registering.cache_clear()
        for name in ("found_plugin", "found_reward"):
            sys.modules.pop(name, None)

    def check(plugin=PLUGIN, target=TARGET, **members):
        info = tmp_path / "miles_found-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: miles-found\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[miles]\nfound = found_plugin\n")
        (tmp_path / "found_plugin.py").write_text(plugin)
        (tmp_path / "found_reward.py").write_text(target)
        monkeypatch.syspath_prepend(str(tmp_path))
        forget()
        contract = type("TestFound", (RewardContract,), {"name": "found", "bad_options": [{"scale": -1.0}], **members})
        failed = []
        for name in standard_tests(contract):
            try:
                getattr(contract(), name)()
            except (Exception, pytest.fail.Exception):
                failed.append(name)
        return failed

    yield check
    forget()


def test_a_sound_plugin_passes(failing):
    assert failing() == []


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (("MILES_API = 1", ""), "test_its_plugin_says_which_api_it_was_made_for"),
        (("from dataclasses", "import torch\nfrom dataclasses"), "test_registering_is_light"),
        (("from dataclasses", "import found_reward\nfrom dataclasses"), "test_the_target_is_imported_only_when_built"),
        ((', summary="Judges"', ""), "test_it_is_described"),
        (("found_reward:Judge", "found_reward:Judges"), "test_it_is_what_its_kind_asks_for"),
        (("scale: float = 1.0", "scale: int = 'x'"), "test_its_options_are_valid"),
        (("scale: float", "scale: object"), "test_options_of_a_wrong_type_are_refused"),
        (('"--found": "scale"', '"--found": "scal"'), "test_its_flags_name_options"),
        (('"--found": "scale"', '"found": "scale"'), "test_its_flags_name_options"),
        (('"--found": "scale"', '"--lr": "scale"'), "test_its_flags_collide_with_no_other"),
        (('"--found": "scale"', '"--eps-clip": "scale"'), "test_its_flags_collide_with_no_other"),
        (('summary="Judges"', 'summary="Judges", needs={"a_pony"}'), "test_it_needs_what_can_be_asked_for"),
        (("def miles_register_rewards", "def miles_register_reward"), "test_its_plugin_is_found_and_loads"),
    ],
    ids=str,
)
def test_unsound_plugins_are_caught(failing, change, test):
    assert test in failing(PLUGIN.replace(*change))


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (("def score(self, sample)", "def score(self, sample, group)"), "test_it_is_what_its_kind_asks_for"),
        (("options.scale < 0", "False"), "test_bad_options_are_refused"),
    ],
    ids=str,
)
def test_unsound_targets_are_caught(failing, change, test):
    assert test in failing(target=TARGET.replace(*change))


@pytest.mark.parametrize(
    ("flag", "collide"), [('"--found": "scale"', False), ('"--found": "other"', True), ('"--found": ""', True)]
)
def test_a_flag_that_two_of_a_kind_share_means_the_same_option(failing, flag, collide):
    plugin = PLUGIN.replace("scale: float = 1.0", "scale: float = 1.0\n    other: float = 1.0").replace(
        "return {", f'return {{"more": Component("found_reward:More", options=Options, flags={{{flag}}}), '
    )
    assert ("test_its_flags_collide_with_no_other" in failing(plugin)) is collide


def test_options_that_take_anything_are_caught(failing):
    """A hand-written check of options that lets a misspelt one pass."""
    plugin = PLUGIN.replace("from dataclasses import dataclass", "from pydantic import BaseModel").replace(
        "@dataclass(frozen=True)\nclass Options:", "class Options(BaseModel, extra='allow'):"
    )
    with pytest.raises(pytest.skip.Exception):
        failing(plugin)
