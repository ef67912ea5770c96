"""Commands, exit codes, and what they print."""

import json
import re
import sys
import types

import pytest

import miles as package
from miles.cli import brought
from miles.errors import EngineError, RunInterrupted


@pytest.fixture
def jobs(monkeypatch):
    """The jobs replaced by ones that note what they were asked."""
    module = types.ModuleType("miles.jobs")
    module.calls = []
    module.run_training = lambda resolved: module.calls.append(("train", resolved.config))

    def evaluate(resolved, checkpoint=None):
        module.calls.append(("eval", resolved.config, checkpoint))
        return {"sums": {"accuracy": 0.5}}

    module.run_evaluation = evaluate
    batches = [{"rollout/samples/trained": 4.0, "rollout/reward": r, "data/long": r, "rollout/x": 1.0} for r in (0, 1)]
    module.run_rollouts = lambda resolved: module.calls.append(("rollout", resolved.config)) or batches
    monkeypatch.setitem(sys.modules, "miles.jobs", module)
    return module


@pytest.fixture
def bring(monkeypatch, tmp_path):
    """`bring(distribution, command, code)`: install a plugin that brings a command. What was imported stays so."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, command, code):
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Name: {distribution}\nVersion: 1.2\nSummary: greets people\n")
        info.joinpath("entry_points.txt").write_text(f"[miles.commands]\n{command} = {module}\n")

    return install


def test_a_command_whose_plugin_is_not_installed(miles, monkeypatch):
    monkeypatch.setitem(brought.ELSEWHERE, "fly", "miles-fly")
    assert "pip install miles-fly" in miles("--help")[1]
    code, _, err = miles("fly", "somewhere")
    assert code == 2
    assert "pip install miles-fly" in err


def test_a_plugin_brings_a_command(miles, bring):
    bring("miles-greet", "greet", "def run(call):\n    print('hello', *call.words)\n    return 3\n")
    assert miles("greet", "you", "--loudly") == (3, "hello you --loudly\n", "")
    assert re.search(r"^  greet +greets people$", miles("--help")[1], re.M)
    assert "did you mean 'greet'" in miles("gret")[2]


def test_a_command_of_two_plugins_and_one_that_cannot_be_imported(miles, bring):
    bring("miles-bow", "greet", "import miles_nowhere")
    code, _, err = miles("greet")
    assert code == 2
    assert "miles-bow 1.2 cannot be imported: No module named 'miles_nowhere'" in err
    bring("miles-nod", "greet", "")
    code, _, err = miles("greet")
    assert code == 2
    assert "miles-bow 1.2 and miles-nod 1.2: uninstall one" in err


def test_usage_version_and_unknown_commands(miles):
    code, out, _ = miles("--help")
    assert code == 0
    assert all(command in out for command in ("train", "eval", "config", "plugins"))
    assert miles("--version") == (0, f"miles {package.__version__}\n", "")
    assert miles()[0] == 2
    code, _, err = miles("trian")
    assert code == 2
    assert "did you mean 'train'" in err
    code, _, err = miles("-p", "wandb", "plugins")
    assert code == 2
    assert "no:NAME" in err


def test_train_hands_over_the_configuration(miles, jobs, base):
    assert miles("train", *base, "--lr", "1e-3", "-p", "no:llama")[0] == 0
    ((_, config),) = jobs.calls
    assert config.optimizer.lr == 1e-3
    assert config.plugins.block == ("llama",)


def test_dry_run_prints_components_numbers_and_placement_and_builds_nothing(miles, jobs, base):
    code, out, _ = miles("train", "--dry-run", *base)
    assert code == 0
    assert jobs.calls == []
    lines = [line.split() for line in out.splitlines()]
    assert ["rollout.engine", "torch", "miles", package.__version__] in lines
    assert ["algorithm.policy_loss", "ppo_clip", "miles", package.__version__] in lines
    assert ["samples_per_rollout", "256"] in lines
    assert ["total_optimizer_steps", "2"] in lines
    assert "trainer" in out


def test_dry_run_shows_the_options_that_were_given(miles, jobs, base):
    _, out, _ = miles("train", "--dry-run", *base, "--torch-max-running", "5", "--torch-max-len", "99")
    (row,) = [line.split() for line in out.splitlines() if line.strip().startswith("rollout.engine ")]
    assert row[1:2] + row[-2:] == ["torch", "max_running=5,", "max_len=99"]


def test_dry_run_says_what_only_the_data_can_tell(miles, jobs, base):
    sets = [
        "--data.sets.b.path=train.jsonl",
        "--data.sets.b.generate=single_turn",
        "--data.sets.b.n_samples_per_prompt=2",
    ]
    _, out, _ = miles("train", "--dry-run", *base, "--num-rollout", "none", "--num-epoch", "1.5", *sets)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "as many as 1.5 epochs of the prompts take" in lines["num_rollout"]
    assert "as many as 1.5 epochs of the prompts take" in lines["total_optimizer_steps"]
    assert "as many as the task sets of its prompts draw" in lines["global_batch_size"]


def test_a_wrong_configuration_is_one_message_and_exit_code_2(miles, jobs, base):
    code, out, err = miles("train", *base, "--kl-coef", "-1", "--colocat")
    assert (code, out, jobs.calls) == (2, "", [])
    assert err.startswith("miles: 2 problems in the configuration")
    assert "Traceback" not in err
    with pytest.raises(ValueError, match="2 problems"):
        miles("train", *base, "--kl-coef", "-1", "--colocat", "--debug")


def test_files_that_are_not_there(miles, jobs, base):
    code, _, err = miles("train", *base, "--data.sets.0.path=trian.jsonl@[0:2]", "--ref-load", "./nowhere/at/all")
    assert code == 2
    assert "did you mean train.jsonl?" in err
    assert "model.ref_load" in err
    assert miles("train", *base, "--data.sets.0.path=hub:somebody/something")[0] == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunInterrupted("stopped by SIGTERM", 15), 143),
        (RunInterrupted("stopped by Ctrl-C", 2), 130),
        (KeyboardInterrupt(), 130),
        (EngineError("the engine is gone"), 1),
    ],
)
def test_exit_codes(miles, jobs, base, error, code):
    def fail(resolved):
        raise error

    jobs.run_training = fail
    got, _, err = miles("train", *base)
    assert got == code
    assert str(error) in err
    assert "Traceback" not in err


def test_eval(miles, jobs, base, tmp_path):
    flags = [*base, "--eval-prompt-data", "sums", "train.jsonl"]
    code, out, err = miles("eval", *flags)
    assert (code, out) == (0, "sums:\n  accuracy  0.5\n")
    assert "(model.hf_checkpoint)" in err
    assert json.loads(miles("eval", *flags, "--json")[1]) == {"sums": {"accuracy": 0.5}}
    run = tmp_path / "run"
    run.mkdir()
    assert "no checkpoint in" in miles("eval", *flags, "--checkpoint", run)[2]
    (run / "step_000003").mkdir()
    (run / "step_000003" / "manifest.json").write_text('{"step": 3, "files": {}}')
    assert f"step 3: {run}" in miles("eval", *flags, "--checkpoint", run)[2]
    assert jobs.calls[-1][2] == run
    (run / "config.json").write_text("{}")
    miles("eval", *flags, "--checkpoint", run)
    assert jobs.calls[-1][2] is None
    assert jobs.calls[-1][1].model.hf_checkpoint == str(run)
    assert miles("eval", *base)[0] == 2
    assert miles("eval", *flags, "--checkpoint", "nowhere")[0] == 2


def test_rollout(miles, jobs, base):
    code, out, _ = miles("rollout", *base, "--dump", "folder")
    lines = [line.split() for line in out.splitlines()]
    assert (code, lines[0]) == (0, ["folder:", "2", "batches", "more"])
    assert dict(lines[1:]) == {
        "rollout/samples/trained": "8",
        "rollout/reward": "0.5",
        "data/long": "1",
        "rollout/x": "1",
    }
    assert jobs.calls[-1][1].rollout.dump.name == "folder"
    code, _, err = miles("rollout", *base)
    assert code == 2
    assert "--dump FOLDER" in err

    def stopped(resolved):
        raise RunInterrupted("stopped by SIGINT", 2)

    jobs.run_rollouts = stopped
    code, _, err = miles("rollout", *base, "--dump", "folder")
    assert code == 130
    assert "every whole batch is in folder; the same command goes on" in err


def test_misspelt_flags_and_words_of_a_command(miles, base):
    assert "did you mean --changed? see `miles config --help`" in miles("config", *base, "--changd")[2]
    assert "see `miles config --help`" in miles("config", *base, "--xyzzy")[2]
    assert "did you mean 'doctor'?" in miles("plugins", "doctr")[2]


def test_config_prints_values_with_origins(miles, base, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "rollout:\n  batch_size: 4\nalgorithm: {policy_loss: {name: ppo_clip, eps: 0.1}}\n"
    )
    code, out, _ = miles("config", "run.yaml", "--lr", "0.5", "--json")
    assert code == 0
    rows = json.loads(out)
    assert rows["rollout.batch_size"] == {"value": 4, "origin": "run.yaml:2"}
    assert rows["optimizer.lr"] == {"value": 0.5, "origin": "--lr"}
    assert rows["algorithm.policy_loss"] == {"value": "ppo_clip", "origin": "run.yaml:3"}
    assert rows["algorithm.policy_loss.eps"] == {"value": 0.1, "origin": "run.yaml:3"}
    assert rows["algorithm.policy_loss.eps_high"] == {"value": None, "origin": "default"}
    assert rows["run.seed"] == {"value": 1234, "origin": "default"}
    changed = miles("config", "run.yaml", "--lr", "0.5", "--changed")[1].splitlines()
    assert [line.split("#")[1].strip() for line in changed] == ["run.yaml:2", "run.yaml:3", "run.yaml:3", "--lr"]


def test_plugins_are_listed(miles):
    code, out, err = miles("plugins")
    assert (code, err) == (0, "")
    assert "ppo_clip" in out
    code, out, _ = miles("plugins", "--json", "--kind", "policy_losses")
    table = json.loads(out)
    assert {c["kind"] for c in table["components"]} == {"policy_losses"}
    assert any(p["name"] == "builtin" and p["distribution"] == "miles" for p in table["plugins"])
    assert miles("plugins", "--kind", "policy-loss", "--json")[1] == out
    presets = miles("plugins", "--kind", "preset")[1].splitlines()
    assert presets[0] == "presets (algorithm.preset):"
    dapo = next(line for line in presets if line.startswith("  dapo "))
    assert "algorithm.policy_loss=ppo_clip(eps=0.2, eps_high=0.28)" in dapo
    assert 'rollout.filters=["agreeing_rewards"]' in dapo
    code, _, err = miles("plugins", "--kind", "rewrd")
    assert code == 2
    assert "did you mean 'reward'?" in err
    assert "builtin" not in miles("plugins", "-p", "no:builtin")[1].split()


def test_help_lists_every_flag(miles):
    from miles.config.leaves import flag_table

    out = miles("train", "--help")[1].split()
    words = {word.strip(",") for word in out}
    assert [flag for flag in flag_table() if flag not in words] == []
    assert "--eps-clip" in words
    for command in ("eval", "rollout", "config", "plugins"):
        code, out, _ = miles(command, "--help")
        assert code == 0
        assert out.startswith(f"usage: miles {command}")
