"""docs/writing-a-plugin.md, done as it says: its commands are run, its files written, its tests and its run pass."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)(?: (\S+)( \+)?)?\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
"""Language, path, whether it is added to the file, text."""
PLUGINS = ("ranks", "digits", "sticks", "phi")


class Reader:
    """Somebody who follows the page in an empty folder."""

    def __init__(self, folder):
        self.folder = folder
        self.said = {}
        """What each command printed."""

    def follow(self):
        """Commands and files, in the order of the page. The model is there from the start."""
        for language, path, added, text in FENCES:
            if path:
                target = self.folder / path
                assert not path.startswith("miles-") or target.exists(), f"new-plugin writes no {path}"
                before = f"{target.read_text(encoding='utf-8')}\n\n" if added else ""
                target.write_text(before + text, encoding="utf-8")
            elif language == "console":
                for line in re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE):
                    self.said[line] = self.run(*line.split())
                    self.install()

    def run(self, *words):
        path = os.pathsep.join(map(str, self.folder.glob("miles-*")))
        done = subprocess.run(
            [sys.executable, "-m", *words],
            capture_output=True, text=True, check=False, cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
        return done.stdout

    def install(self):
        """As `pip install -e` would: metadata beside a package on the path."""
        for folder in self.folder.glob("miles-*"):
            project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
            info = folder / f"{folder.name.replace('-', '_')}-{project['version']}.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
            points = project["entry-points"]["miles"]
            (info / "entry_points.txt").write_text("[miles]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    prepare = ROOT / "examples" / "quickstart" / "prepare.py"
    subprocess.run([sys.executable, str(prepare), "--out", str(folder / "tiny")], check=True, capture_output=True)
    reader = Reader(folder)
    reader.follow()
    return reader


def test_every_command_on_the_page_was_run(reader):
    said = reader.said
    assert [line for line in said if line.startswith("miles new-plugin")] == [
        "miles new-plugin advantage-estimator ranks",
        "miles new-plugin reward digits",
        "miles new-plugin environment sticks",
        "miles new-plugin bridge phi",
    ]
    shown = PAGE.partition("$ miles new-plugin advantage-estimator ranks\n")[2].partition("```")[0]
    assert said["miles new-plugin advantage-estimator ranks"] == shown
    assert "ranks" in said["miles plugins --kind advantage_estimators"]
    assert "all is well" in said["miles plugins doctor"]
    assert "miles-ranks" not in said["miles plugins -p no:ranks"]
    assert "nothing was built" in said["miles train sticks.yaml --dry-run"]
    recipe = said["miles config sticks.yaml --preset ranks_recipe --changed"]
    assert "loss_aggregation" in recipe
    assert "ranks_recipe" in recipe


def test_the_tests_of_the_four_packages_pass(reader):
    stale = [path for name in PLUGINS for path in (reader.folder / f"miles-{name}" / "tests").glob("test_*.py")]
    on_page = {path for _, path, _, _ in FENCES if path}
    assert {str(path.relative_to(reader.folder)) for path in stale} <= on_page, "a test of the template was left"
    reader.run("pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *map(str, stale))


def test_what_the_page_shows_is_clean(reader):
    folders = [f"miles-{name}" for name in PLUGINS]
    reader.run("ruff", "check", "--no-cache", *folders)
    reader.run("ruff", "format", "--no-cache", "--check", *folders)


def test_the_three_trained_a_model_together(reader):
    run = reader.folder / "runs" / "sticks"
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "train/grad_norm" in step]
    assert len(trained) == 2
    assert all(step["train/grad_norm"] > 0 for step in trained)
    assert all("rollout/reward_parts/digits/plain" in step for step in trained)
    samples = [json.loads(line) for path in sorted((run / "rollouts").glob("*.jsonl")) for line in path.open()]
    assert len(samples) == 2 * 4 * 8
    for sample in samples:
        parts = sample["reward_parts"]
        assert {"environment", "digits", "digits/plain"} <= parts.keys()
        assert sample["reward"] == pytest.approx(parts["environment"] + 0.5 * parts["digits"])
        assert "sticks. We take 1 to 3 sticks" in sample["prompt"] or sample["turns"]
    plugins = {entry["name"] for entry in json.loads((run / "plugins.json").read_text())}
    assert {"ranks", "digits", "sticks"} <= plugins


def test_places_in_the_messages_shown_are_those_of_the_definitions(reader):
    shown = re.findall(r"^(?:\w+ )+'?(\w+)'? \(miles_(\w+)/(\w+\.py):(\d+)\)", PAGE, flags=re.MULTILINE)
    assert [name for name, *_ in shown] == ["ranks", "Sticks", "digits"]
    for name, plugin, file, line in shown:
        lines = (reader.folder / f"miles-{plugin}" / f"miles_{plugin}" / file).read_text().splitlines()
        assert re.match(rf"(def|class) {name}\b", lines[int(line) - 1], flags=re.IGNORECASE)


@pytest.mark.slow
def test_the_four_packages_build(reader, tmp_path):
    """A wheel holds the module, the marker of types and the entry point."""
    import zipfile

    for name in PLUGINS:
        source = tmp_path / name
        shutil.copytree(reader.folder / f"miles-{name}", source, ignore=shutil.ignore_patterns("*.dist-info"))
        wheel = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        reader.run(*wheel, "-w", str(tmp_path), str(source))
        [path] = tmp_path.glob(f"miles_{name}-*.whl")
        held = zipfile.ZipFile(path).namelist()
        assert {f"miles_{name}/plugin.py", f"miles_{name}/py.typed"} <= set(held)
        assert any(entry.endswith("entry_points.txt") for entry in held)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^## (.*)$", PAGE, flags=re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings
