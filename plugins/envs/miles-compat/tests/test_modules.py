"""What functions of upstream import: it is there when a `slime_function` is, and the core's package is as it was."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
from miles_compat.modules import OFFERED, PACKAGES, ROOTS, offer_modules

offer_modules()


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", OFFERED)
def test_every_module_that_is_offered_can_be_imported(root, name):
    module = importlib.import_module(f"{root}.{name}")
    source = importlib.import_module(f"miles_compat.offered.{OFFERED[name]}")
    assert module.__doc__
    assert all(getattr(module, each) is getattr(source, each) for each in source.__all__)


def test_there_is_one_sample():
    slime, miles = (importlib.import_module(f"{root}.utils.types") for root in ROOTS)
    assert slime.Sample is miles.Sample
    assert slime.Sample.Status.COMPLETED.value == "completed"


def test_what_utils_misc_does():
    misc = importlib.import_module("slime.utils.misc")
    assert misc.load_function("json.dumps") is json.dumps
    assert misc.load_function(None) is None
    kind = misc.SingletonMeta("Once", (), {})
    before = kind()
    assert kind() is before
    misc.SingletonMeta.clear_all_instances()
    assert kind() is not before


def test_nothing_of_the_core_is_called_so():
    """The finder is asked before the core's own files are looked for: no name of theirs may be one of these."""
    import miles
    import miles.rollout

    for name in OFFERED:
        package = {"rollout": miles.rollout, "": miles}.get(name.rpartition(".")[0])
        if package is not None:
            assert PathFinder.find_spec(f"miles.{name}", package.__path__) is None, name
    for name in PACKAGES - {"", "rollout"}:
        parent, _, _ = name.partition(".")
        path = miles.rollout.__path__ if parent == "rollout" else miles.__path__
        assert PathFinder.find_spec(f"miles.{name}", path) is None, name
    assert importlib.import_module("miles.rollout").__file__.endswith("miles/rollout/__init__.py")
    assert importlib.import_module("miles.rollout.task").Task


def test_what_is_not_offered_is_an_import_error_that_says_what_is():
    with pytest.raises(ModuleNotFoundError, match=r"'slime.utils.mask_utils': miles-compat offers slime.utils.types"):
        importlib.import_module("slime.utils.mask_utils")
    with pytest.raises(ModuleNotFoundError, match=r"'miles.utils.nothing': miles-compat offers miles.utils.types"):
        importlib.import_module("miles.utils.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"'miles.rollout.rm_hub.math_utils': miles-compat offers"):
        importlib.import_module("miles.rollout.rm_hub.math_utils")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'slime.nothing'$"):
        importlib.import_module("slime.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'miles.rollout.nothing'$"):
        importlib.import_module("miles.rollout.nothing")
    with pytest.raises(ImportError, match="cannot import name 'init_http_client'"):
        exec("from slime.utils.http_utils import init_http_client")


def test_without_a_function_there_is_no_slime():
    """Loading plugins, as every command does, changes nothing about imports."""
    program = (
        "from miles.plugins import load_plugins; load_plugins(strict=False)\n"
        "import importlib.util\n"
        "print([importlib.util.find_spec(name) is None for name in ('slime', 'miles.utils')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True]"


def test_an_installed_slime_keeps_its_other_modules(tmp_path):
    """Its `Sample` is the one that functions are given, whatever it has itself."""
    for folder in ("slime", "slime/utils", "slime/rollout", "slime/rollout/rm_hub"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "slime/utils/types.py").write_text("class Sample: ...")
    (tmp_path / "slime/rollout/rm_hub/math_utils.py").write_text("answer = 42")
    program = (
        "from miles_compat.modules import offer_modules; offer_modules()\n"
        "from slime.utils.types import Sample\n"
        "from slime.rollout.rm_hub import async_rm\n"
        "from slime.rollout.rm_hub.math_utils import answer\n"
        "print(Sample.__module__, async_rm.__module__, answer)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["miles_compat.upstream", "miles_compat.offered.rewards", "42"]
