"""`miles serve` from the command line."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miles.cli import main


def refused(capsys, *words):
    assert main(["serve", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_help_says_what_it_takes(capsys):
    assert main(["serve", "--help"]) == 0
    assert "--port" in capsys.readouterr().out


def test_what_is_wrong_is_said_at_once(capsys, lab, tmp_path, monkeypatch):
    model = lab.tiny.saved("llama")
    assert "needs a checkpoint" in refused(capsys)
    assert "no checkpoint folder" in refused(capsys, tmp_path / "nowhere")
    assert "no config.json" in refused(capsys, tmp_path)
    assert "must be a number from 0" in refused(capsys, model, "--port", "http")
    assert "must be a number from 0" in refused(capsys, model, "--port", "70000")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY is not set" in refused(capsys, model, "--api-key-variable", "NO_SUCH_KEY")
    assert "did you mean 'max_len'" in refused(capsys, model, "--engine.max_lenn=5")
    assert "did you mean --port" in refused(capsys, model, "--prot", "5")
    assert "generates nothing" in refused(capsys, model, "--engine", "none")


def test_a_port_that_is_taken_is_said(capsys, lab, shared):
    port = shared.url.rpartition(":")[2]
    assert "choose another port" in refused(capsys, lab.tiny.saved("llama"), "--port", port, "--device", "cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_to_stop(number):
    from miles_serve.server import until_stopped

    async def main():
        waiting = asyncio.ensure_future(until_stopped())
        await asyncio.sleep(0)
        os.kill(os.getpid(), number)
        return await asyncio.wait_for(waiting, 5)

    assert asyncio.run(main()) == number


@pytest.mark.slow
def test_it_serves_until_a_signal(lab):
    """As a program of its own: it says where it is, answers under its name and key, and ends in peace."""
    command = [sys.executable, "-m", "miles", "serve", str(lab.tiny.saved("llama")), "--port", "0", "--device", "cpu"]
    more = ["--served-model-name", "little", "--engine.max_len=64", "--api-key-variable", "SERVE_KEY"]
    environment = os.environ | {"SERVE_KEY": "sesame"}
    with subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said = process.stdout.readline()
            client = lab.Client(said.split(" at ")[1].split()[0], {"Authorization": "Bearer sesame"})
            assert client.get("/v1/models").json["data"][0]["id"] == "little"
            assert client.get("/server_info").json["context_length"] == 64
            sampling = {"max_new_tokens": 3, "ignore_eos": True}
            reply = client.post("/generate", {"text": "hello", "sampling_params": sampling})
            assert len(reply.json["output_ids"]) == 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert "SIGTERM: stopping" in process.stderr.read()
        finally:
            process.kill()


def test_a_run_directory_is_known_by_what_is_in_it(lab, tmp_path, monkeypatch):
    from miles_serve.command import _run_of

    step = tmp_path / "run" / "checkpoints" / "step_000060"
    step.mkdir(parents=True)
    assert _run_of(tmp_path / "run") is None
    (tmp_path / "run" / "config.yaml").write_text("{}")
    assert _run_of(tmp_path / "run") == _run_of(step) == tmp_path / "run"
    monkeypatch.chdir(tmp_path / "run")
    assert _run_of(Path("owner/name")) is None
    assert _run_of(lab.tiny.checkpoint(tmp_path / "run" / "hf", lab.tiny.hf_config("llama"))) is None


def test_a_run_whose_model_is_not_where_its_settings_say_is_told_why(capsys, lab, tmp_path, monkeypatch):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text('{"step": 1, "files": {}}')
    (run / "config.yaml").write_text("model: {hf_checkpoint: ./made/model}\n")
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, run)
    assert "no checkpoint folder at made/model" in said
    assert f"{run / 'config.yaml'}, with paths from where the run was started" in said
    assert "--hf-checkpoint" not in refused(capsys, tmp_path / "nowhere")
