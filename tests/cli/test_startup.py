"""The command line starts quickly, and without torch."""

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "safetensors")
RUN = ["--hf-checkpoint", "org/x", "--num-rollout", "1", "--prompt-data", "hub:a/b", "--generate", "single_turn"]


def loaded_after(source):
    program = f"{source}\nimport sys; print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split("LOADED", 1)[1].split())


def computed():
    """Seconds of the processor that processes started here have taken: others use it, too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "source",
    [
        "import miles.cli",
        "import miles.api",
        "import miles.config.load",
        "from miles.plugins import load_plugins; load_plugins()",
        "from miles.cli import main; main(['train', '--help'])",
        "from miles.cli import main; main(['plugins'])",
        f"from miles.cli import main; assert main(['train', '--dry-run', *{RUN}]) == 0",
    ],
)
def test_no_torch_is_loaded(source):
    assert loaded_after(source).isdisjoint(HEAVY)


def test_a_dry_run_that_looks_at_everything_loads_no_torch_and_is_quick(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sums.jsonl").write_text('{"input": "1+1", "label": "2"}\n' * 20_000)
    flags = ["--hf-checkpoint", str(tmp_path), "--ref-load", str(tmp_path), "--num-rollout", "1",
             "--prompt-data", str(tmp_path / "sums.jsonl"), "--rm-type", "exact_match"]  # fmt: skip
    start = computed()
    loaded = loaded_after(f"from miles.cli import main; assert main(['train', '--dry-run', *{flags}]) == 0")
    assert loaded.isdisjoint(HEAVY)
    assert computed() - start < 5


def test_importing_the_command_line_loads_no_numpy_and_no_pydantic():
    assert loaded_after("import miles.cli").isdisjoint(("numpy", "pydantic", "pluggy", "yaml"))


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = computed()
        subprocess.run([sys.executable, "-m", "miles", "--help"], capture_output=True, check=True)
        seconds.append(computed() - start)
    assert min(seconds) < 0.5


def test_the_shims_are_the_command_line():
    from pathlib import Path

    root = Path(__file__).parents[2]
    for name, words in (("train.py", "usage: miles train"), ("train_async.py", "usage: miles train")):
        done = subprocess.run([sys.executable, root / name, "--help"], capture_output=True, text=True, check=True)
        assert words in done.stdout
    asked = [sys.executable, root / "train_async.py", "--rollout-engine", "none"]
    refused = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "rollout.mode = 'one_step_off'" in refused.stderr
