"""`miles new-plugin`: what it writes installs, works and is clean, for every kind; and what it refuses."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from miles.cli import main
from miles.cli.kinds import kind_called
from miles.errors import UnknownNameError
from miles.kinds import KINDS

SLOW_CONTRACTS = ("executors",)
"""Starts two processes a test; run by the slow test below."""


def name_of(kind):
    return f"trial-{kind.replace('_', '-')}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A plugin of every kind: kind -> folder."""
    parent = tmp_path_factory.mktemp("written")
    for kind in KINDS:
        assert main(["new-plugin", kind, name_of(kind), "--dir", str(parent)]) == 0
    return {kind: parent / f"miles-{name_of(kind)}" for kind in KINDS}


@pytest.fixture(scope="module")
def environment(written):
    """Of a process in which all of them are as good as installed: each folder is on the path, beside the metadata that
    pip would have written."""
    for folder in written.values():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        stem = f"{project['name'].replace('-', '_')}-{project['version']}"
        info = folder / f"{stem}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        points = project["entry-points"]["miles"]
        (info / "entry_points.txt").write_text("[miles]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, written.values()))}


def run(*command, **more):
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_every_kind_shows_among_the_plugins(written, environment):
    listed = json.loads(run("miles", "plugins", "--json", env=environment))["components"]
    found = {(each["kind"], each["name"]): each["distribution"] for each in listed}
    for kind in KINDS:
        assert found[kind, name_of(kind).replace("-", "_")] == f"miles-{name_of(kind)}"
    assert "all is well" in run("miles", "plugins", "doctor", env=environment)


def test_all_their_tests_pass(written, environment):
    tests = [
        str(path)
        for kind, folder in written.items()
        for path in sorted((folder / "tests").glob("test_*.py"))
        if not (kind in SLOW_CONTRACTS and path.name == "test_contract.py")
    ]
    run("pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *tests, env=environment)


def test_what_is_written_is_clean(written):
    folders = [str(folder) for folder in written.values()]
    run("ruff", "check", "--no-cache", *folders)
    run("ruff", "format", "--no-cache", "--check", *folders)


def test_longest_and_shortest_names_leave_it_clean(tmp_path):
    for word in ("x", "a-name-of-thirty-two-characters-"[:31] + "x"):
        for kind in KINDS:
            assert main(["new-plugin", kind, f"{word}", "--dir", str(tmp_path / word / kind)]) == 0
    run("ruff", "check", "--no-cache", str(tmp_path))
    run("ruff", "format", "--no-cache", "--check", str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_what_a_package_needs(written, kind):
    folder = written[kind]
    package = folder / folder.name.replace("-", "_")
    for path in ("README.md", "pyproject.toml", "tests/test_contract.py"):
        assert (folder / path).is_file()
    for path in ("__init__.py", "plugin.py", "py.typed"):
        assert (package / path).is_file()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["dependencies"][0].startswith("miles>=")
    assert project["version"] == "0.1.0"
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".py", ".md", ".toml"))
    assert "$" not in text
    assert not any(word in text for word in ("TO" + "DO", "NotImplemented" + "Error"))


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("reward", "rewards"),
        ("rewards", "rewards"),
        ("policy-loss", "policy_losses"),
        ("policy_losses", "policy_losses"),
        ("is-correction", "is_corrections"),
        ("Advantage-Estimator", "advantage_estimators"),
        ("policy loss", "policy_losses"),
        ("rollout.engine", "rollout_engines"),
        ("transport", "weight_syncs"),
    ],
)
def test_kinds_by_any_of_their_names(word, kind):
    assert kind_called(word).name == kind


def test_a_kind_that_there_is_not():
    with pytest.raises(UnknownNameError, match=r"did you mean 'reward'"):
        kind_called("rewrads")


def test_it_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "reward", "brevity"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "wrote miles-brevity: the reward 'brevity'. Next:"
    assert lines[2:] == [
        'pip install -e "./miles-brevity[test]"',
        "pytest ./miles-brevity",
        "miles train config.yaml --rm-type brevity",
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["reward"], "KIND NAME"),
        (["reward", "brevity", "--force"], "does not take '--force'"),
        (["reward", "Brevity!"], "lower-case letters"),
        (
            ["reward", "class"],
            "is a word of the Python language and cannot name a plugin; choose another name, such as 'class-reward'",
        ),
        (["reward", "a" * 40], "at most 32"),
        (["advantage-estimator", "grpo"], "is that of plugin 'grpo' of miles-grpo"),
        (["advantage-estimator", "none"], "means something else"),
        (["reward", "grpo"], "there is plugin 'grpo'"),
        (["reward", "cispo"], "there is plugin 'cispo' of miles-cispo"),
        (["reward", "megatron"], "miles-megatron is a plugin of miles itself"),
    ],
)
def test_what_is_refused(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_module_hides_nothing(tmp_path, capsys):
    """Adapters are called like what they adapt: the package is miles_json, and json stays what it is."""
    for name in ("json", "torch"):
        for kind in KINDS:
            taken = (kind, name) == ("rollout_engines", "torch")
            assert main(["new-plugin", kind, name, "--dir", str(tmp_path / kind)]) == (2 if taken else 0)
    assert (
        "There is a module torch, too. It is not hidden: yours is imported as miles_torch." in capsys.readouterr().out
    )
    run("ruff", "check", "--no-cache", str(tmp_path))
    program = "import json, torch, miles_json.plugin, miles_torch.plugin; json.dumps(1); torch.zeros(1)"
    folders = [str(tmp_path / "rewards" / f"miles-{name}") for name in ("json", "torch")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_nothing_is_overwritten(tmp_path, capsys):
    folder = tmp_path / "miles-brevity"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    assert main(["new-plugin", "reward", "miles-brevity", "--dir", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_help_names_every_kind(capsys):
    assert main(["new-plugin", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(kind.word in out for kind in KINDS.values())


# ---------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_slow_contracts(written, environment):
    tests = [str(written[kind] / "tests" / "test_contract.py") for kind in SLOW_CONTRACTS]
    run("pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *tests, env=environment)


@pytest.mark.slow
def test_types_agree(written, environment):
    packages = [word for folder in written.values() for word in ("-p", folder.name.replace("-", "_"))]
    paths = os.pathsep.join(map(str, written.values()))
    run("mypy", "--ignore-missing-imports", "--check-untyped-defs", *packages, env={**environment, "MYPYPATH": paths})


@pytest.mark.slow
def test_one_installs_for_real(tmp_path):
    """Editable, in a virtual environment of its own that sees what is installed here."""
    assert main(["new-plugin", "rewards", "trial-install", "--dir", str(tmp_path)]) == 0
    folder, venv = tmp_path / "miles-trial-install", tmp_path / "venv"
    run("venv", "--system-site-packages", "--without-pip", str(venv))
    python = venv / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    outer = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    (Path(site) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    for command in (
        ["pip", "install", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-e", str(folder)],
        ["pytest", str(folder)],
        ["miles", "plugins", "--kind", "rewards"],
    ):
        done = subprocess.run([str(python), "-m", *command], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "trial_install" in done.stdout
