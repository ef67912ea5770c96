"""A run that is killed and started again ends bit for bit where one that was left alone does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from miniature import assert_same_end, final_state, job, metrics, sums_in

ROOT = Path(__file__).parents[2]
JUDGE = """
def short(sample):
    return float(any(c.isdigit() for c in sample.text)) - 0.1 * sample.response_length
"""


@pytest.fixture(scope="module")
def command(checkpoint, tmp_path_factory):
    """A command line that trains for eight steps, saving every second one, in a run directory of one's choice."""
    folder = tmp_path_factory.mktemp("resume")
    config = job(checkpoint, sums_in(folder), folder)
    (folder / "judge.py").write_text(JUDGE)
    for task_set in (*config["data"]["sets"], *config["eval"]["sets"]):
        task_set["reward"] = "judge:short"
    config["rollout"]["num_rollout"] = 8
    config["eval"]["interval"] = 3
    config["checkpoint"] = {"interval": 2, "keep": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def start(run_dir, *flags):
        words = [sys.executable, "-m", "miles", "train", "config.yaml", "--run-dir", str(run_dir), *flags]
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)

    return start


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run directory of one that was left alone."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(command(run_dir))
    return run_dir


def finish(process, code=0):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def kill_and_restart(command, run_dir, times, seed):
    """Start the same command again and again, killing it `times` times at random moments; then let it finish."""
    rng = random.Random(os.environ.get("MILES_TEST_SEED", seed))
    kills = 0
    for _ in range(times):
        process = command(run_dir)
        steps = rng.randint(1, 3)
        for line in process.stderr:  # a line a step
            steps -= line.startswith("step ")
            if not steps:
                break
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    finish(command(run_dir))
    assert kills >= times / 2, "most runs ended before they could be killed"


@pytest.mark.slow
def test_killed_at_random_moments(command, whole, tmp_path):
    kill_and_restart(command, tmp_path / "killed", times=4, seed="1")
    assert_same_end(whole, tmp_path / "killed")


@pytest.mark.slow
def test_killed_with_a_critic(command, tmp_path):
    def ppo(run_dir):
        return command(run_dir, "--advantage-estimator", "ppo", "--critic-lr", "3e-3", "--num-critic-only-steps", "3")

    finish(ppo(tmp_path / "whole"))
    kill_and_restart(ppo, tmp_path / "killed", times=2, seed="3")
    assert {name.partition("/")[0] for name in final_state(tmp_path / "whole")} == {"actor", "critic"}
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_the_quickstart_killed_at_random_moments(tmp_path):
    """The recipe of examples/quickstart, for its first steps, from the model that has learnt nothing."""
    prepare = ROOT / "examples/quickstart/prepare.py"
    subprocess.run([sys.executable, prepare, "--out", tmp_path / "data"], check=True, capture_output=True)

    def command(run_dir):
        flags = ["--hf-checkpoint", "data/model", "--num-rollout", "8", "--save-interval", "2", "--eval-interval", "4"]
        words = [sys.executable, "-m", "miles", "train", ROOT / "examples/quickstart/grpo.yaml", *flags]
        words += ["--run-dir", run_dir, "--deterministic-mode", "--eval.sets.heldout.path=data/heldout.jsonl@[0:100]"]
        return subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    finish(command(tmp_path / "whole"))
    kill_and_restart(command, tmp_path / "killed", times=3, seed="2")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(command, whole, tmp_path, number, code):
    process = command(tmp_path / "stopped")
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    errors = finish(process, code)
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 3
    finish(command(tmp_path / "stopped"))
    assert_same_end(whole, tmp_path / "stopped")
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["resumed_from"] == summary["steps"]


def test_a_damaged_checkpoint_is_passed_over(config, tmp_path, caplog):
    import miles

    flags = {"num_rollout": 3, "save_interval": 1, "keep_checkpoints": 3}
    miles.train(config, **flags, run_dir=str(tmp_path / "whole"))
    miles.train(config, **flags, run_dir=str(tmp_path / "hurt"))
    newest = tmp_path / "hurt" / "checkpoints" / "step_000003" / "actor"
    next(newest.iterdir()).write_bytes(b"not a checkpoint")
    run = miles.train(config, **flags, run_dir=str(tmp_path / "hurt"))
    assert "step_000003 is damaged" in caplog.text
    assert run.resumed_from == 2
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "hurt")


def test_a_finished_run_has_nothing_to_do(config, tmp_path):
    import miles

    miles.train(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = miles.train(config)
    assert (again.status, again.step, again.resumed_from) == ("completed", 2, 2)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(before.splitlines())


def test_an_earlier_run_moves_aside(config, tmp_path):
    import miles

    miles.train(config, num_rollout=1)
    run = miles.train(config, num_rollout=1, resume="never")
    assert run.resumed_from is None
    assert (tmp_path / "run.old-1" / "summary.json").exists()


def test_a_disk_that_cannot_be_written_is_a_clear_error(config, tmp_path):
    import miles
    from miles.errors import CheckpointError

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not be written.*--save"):
        miles.train(config, save=str(tmp_path / "file" / "checkpoints"))


def test_a_full_disk_is_a_clear_error_and_the_last_good_checkpoint_stays(config, tmp_path, monkeypatch):
    import miles
    from miles.builtins.fsdp import backend
    from miles.errors import CheckpointError

    run_dir = tmp_path / "run"
    miles.train(config, num_rollout=1, run_dir=str(run_dir))

    def full(*_, **__):
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(backend, "write_state", full)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*--save.*Last good one: .*step_000001"):
        miles.train(config, num_rollout=2, run_dir=str(run_dir))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert miles.train(config, num_rollout=2, run_dir=str(run_dir)).resumed_from == 1


def test_a_run_that_was_asked_to_stop_is_not_started_again(config, monkeypatch):
    import miles
    from miles import jobs
    from miles.errors import WorkerError

    attempts = []

    async def lost(config, registry, restarts, interrupt):
        attempts.append(restarts)
        interrupt.signal = signal.SIGTERM if restarts else None
        raise WorkerError("a rank died")

    monkeypatch.setattr(jobs, "_attempt", lost)
    with pytest.raises(WorkerError, match="a rank died"):
        miles.train(config, max_restarts=5)
    assert attempts == [0, 1]


def test_a_stop_that_cannot_save_is_a_failure_and_still_has_a_summary(config, tmp_path):
    import miles
    from miles.api import hookimpl
    from miles.errors import CheckpointError

    class Stop:
        @hookimpl
        def miles_on_run_start(self, run):
            run.interrupt.signal = signal.SIGTERM
            run.store.directory = tmp_path / "config.yaml" / "no folder"

    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        miles.train(config, plugins=[Stop()])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_checkpoints_kept_elsewhere_move_aside_too(config, tmp_path):
    import miles

    flags = {"save": str(tmp_path / "elsewhere"), "keep_checkpoints": 1, "eval_before_train": False}
    miles.train(config, num_rollout=2, **flags)
    miles.train(config, num_rollout=1, resume="never", **flags)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["step_000001"]
    assert [path.name for path in (tmp_path / "elsewhere.old-1").iterdir()] == ["step_000002"]


def test_random_numbers_of_hooks_go_on(config, tmp_path):
    import miles
    from miles.api import hookimpl

    def draws(run_dir, *rollouts):
        seen = []

        class Dice:
            @hookimpl
            def miles_modify_samples(self):
                seen.append((float(torch.rand(())), random.random(), float(np.random.rand())))

        for count in rollouts:
            miles.train(config, plugins=[Dice()], num_rollout=count, run_dir=str(run_dir), eval_before_train=False)
        return seen

    assert draws(tmp_path / "whole", 4) == draws(tmp_path / "parts", 2, 4)


def test_another_experiment_does_not_go_on_in_the_same_directory(config, tmp_path):
    import miles
    from miles.errors import ConfigError

    miles.train(config, num_rollout=1)
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.001 then, 0.5 now\n.*--resume never"):
        miles.train(config, num_rollout=2, lr=0.5)
    assert miles.train(config, num_rollout=2, eval_interval=1).resumed_from == 1  # longer, and watched more closely


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on(config, tmp_path):
    import miles

    miles.train(config, num_rollout=1)
    path = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["critic"], settings["optimizer"]["lr_decay_steps"]
    path.write_text(yaml.safe_dump(settings))
    assert miles.train(config, num_rollout=2).resumed_from == 1


def test_where_a_teachers_server_stands_may_change(config, tmp_path):
    from miles.config.load import resolve
    from miles.errors import ConfigError
    from miles.rundir import run_directory

    for_teacher = {"advantage_terms": ["distillation"]}
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    for port in (1, 2):
        teacher = {"urls": {"default": f"http://127.0.0.1:{port}"}}
        resolved = resolve([{**config, "teacher": teacher, "algorithm": for_teacher}])
        with run_directory(resolved.config, resolved.registry.plugins):
            pass
    other = resolve([{**config, "teacher": {**teacher, "key": "who"}, "algorithm": for_teacher}])
    with pytest.raises(ConfigError, match=r"teacher\.key"), run_directory(other.config, other.registry.plugins):
        pass


def test_where_everything_runs_and_in_how_much_memory_may_change(config, tmp_path):
    from miles.config.load import resolve
    from miles.rundir import run_directory

    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    apart = {"rollout": {**config["rollout"], "num_engines": 2}, "weight_sync": {"transport": "disk"}}
    smaller = {"train": {**config["train"], "max_tokens_per_gpu": 64, "gradient_checkpointing": True}}
    for changes in ({}, {"resources": {"actor_num_gpus_per_node": 2}}, apart, smaller):
        resolved = resolve([{**config, **changes}])
        with run_directory(resolved.config, resolved.registry.plugins):
            pass


def test_a_run_is_not_written_over_because_its_checkpoints_are_elsewhere(config, tmp_path):
    import miles
    from miles.errors import ConfigError

    flags = {"num_rollout": 1, "save": str(tmp_path / "elsewhere")}
    miles.train(config, **flags)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.001 then, 0.5 now\n.*--resume never"):
        miles.train(config, lr=0.5, num_rollout=1)
    with pytest.raises(ConfigError, match=r"holds a completed run, and .*/run/checkpoints no checkpoint.*--save"):
        miles.train(config, num_rollout=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    assert miles.train(config, **flags).resumed_from == 1


def test_what_cannot_begin_leaves_the_run_directory_alone(config, tmp_path):
    import miles
    from miles.errors import ConfigError

    with pytest.raises(ConfigError, match=r"/modle \(a hub.*\n.*did you mean .*/model\?"):
        miles.train(config, hf_checkpoint=config["model"]["hf_checkpoint"].replace("model", "modle"))
    assert not (tmp_path / "run").exists()


def test_a_run_directory_deleted_under_way_is_said_and_made_again(config, tmp_path, caplog):
    import miles
    from miles.api import hookimpl

    class Cleaner:
        @hookimpl
        def miles_on_train_step_end(self, run, step):
            if step == 0:
                shutil.rmtree(run.directory)

    run = miles.train(config, plugins=[Cleaner()], num_rollout=2)
    assert run.status == "completed"
    assert "metrics.jsonl was deleted or moved while the run went on" in caplog.text
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_one_process_at_a_time(config, tmp_path):
    import miles
    from miles.config.load import resolve
    from miles.errors import ConfigError
    from miles.rundir import run_directory

    resolved = resolve((config,))
    with (
        run_directory(resolved.config, resolved.registry.plugins),
        pytest.raises(ConfigError, match="is in use by process"),
    ):
        miles.train(config)
    assert miles.train(config, num_rollout=1).status == "completed"
