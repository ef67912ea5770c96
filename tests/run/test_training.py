"""The main job through plugins only: what it writes, and that what it writes is true."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import miles
from miles.errors import RolloutError, WeightSyncError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def test_a_run_leaves_a_complete_directory(config, run_dir):
    run = miles.train(config)
    assert run.status == "completed"
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "plugins.json", "metrics.jsonl", "rollouts", "checkpoints", "summary.json"} <= names
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 2)
    assert summary["tokens"]["generated"] > 2 * 16
    assert set(summary["evaluation"]["heldout"]) == {"first", "last"}
    assert summary["evaluation"]["heldout"]["last"]["prompts"] == 8
    assert torch.__version__.startswith(summary["versions"]["torch"])
    metrics = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert metrics[0]["eval/heldout/reward"] == summary["evaluation"]["heldout"]["first"]["reward"]
    for line in metrics[1:]:
        assert line["rollout/samples/trained"] == 16
        assert line["train/grad_norm"] > 0
        assert 0 <= line["train/train_rollout_logprob_abs_diff"] < 1e-5
    assert {p["name"] for p in json.loads((run_dir / "plugins.json").read_text())} >= {"builtin", "grpo", "qwen"}
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step_000002"]


def test_what_a_run_was_made_of_goes_with_it(config):
    run = miles.train(config, num_rollout=1)
    model = weakref.ref(run.parts.workers.worker.models["actor"].scorer)
    engine = weakref.ref(run.parts.engines[0].scheduler.decoder)
    assert model() is not None
    run.parts.workers.owner = run.parts.engines[0].owner = run  # a cycle, as a plugin makes one
    del run
    gc.collect()
    assert (model(), engine()) == (None, None)


def test_rollouts_on_disk_are_the_samples(config, run_dir, sums):
    miles.train(config)
    samples = lines(run_dir / "rollouts" / "step_000001.jsonl")
    assert [s["id"] for s in samples] == list(range(16))
    for sample in samples:
        n = sample["prompt_length"]
        assert len(sample["tokens"]) == len(sample["loss_mask"]) == len(sample["rollout_log_probs"])
        assert sample["loss_mask"] == [0] * n + [1] * (len(sample["tokens"]) - n)
        assert bytes(sample["tokens"][:n]).decode() == sample["prompt"]
        assert all(v == 0 for v in sample["weight_version"][n:])
    assert {
        tuple(s["weight_version"][s["prompt_length"] :]) for s in lines(run_dir / "rollouts/step_000002.jsonl")
    } <= {(1,) * k for k in range(1, 7)}


def test_learning_rate_zero_changes_nothing(config, run_dir, checkpoint):
    miles.train({**config, "optimizer": {"lr": 0.0}, "checkpoint": {"save_hf": "hf/{step}"}})
    before, after = load_file(checkpoint / "model.safetensors"), load_file(run_dir / "hf/2/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_export_is_what_transformers_loads(config, run_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = miles.train({**config, "checkpoint": {"save_hf": "hf"}})
    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    assert tokenizer("1+1=").input_ids == [ord(c) for c in "1+1="]
    last = lines(run_dir / "rollouts/step_000002.jsonl")[0]
    with torch.no_grad():
        logits = model(torch.tensor([last["tokens"]])).logits[0]
    log_probs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(last["tokens"][1:])[:, None])[:, 0]
    kept = np.array(last["rollout_log_probs"][1:])[last["prompt_length"] - 1 :]
    assert not np.allclose(log_probs[last["prompt_length"] - 1 :], kept, atol=1e-4)  # trained since
    assert run.step == 2


def test_two_runs_agree_to_the_bit(config, tmp_path):
    runs = [miles.train(config, run_dir=str(tmp_path / name), save_hf="hf") for name in ("one", "two")]
    one, two = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert runs[0].evaluation == runs[1].evaluation


def test_the_reference_model_holds_the_policy_back(config, tmp_path):
    def drift(name, **flags):
        miles.train(config, run_dir=str(tmp_path / name), num_rollout=6, lr=3e-3, save_hf="hf", **flags)
        after = load_file(tmp_path / name / "hf" / "model.safetensors")
        return lines(tmp_path / name / "metrics.jsonl")[-1], after

    _, free = drift("free")
    held_metrics, held = drift("held", kl_loss_coef=5.0, kl_loss_type="k3")
    assert held_metrics["train/kl_loss"] > 0
    start = load_file(f"{config['model']['hf_checkpoint']}/model.safetensors")
    distance = [sum(float((m[k] - start[k]).norm()) for k in start) for m in (free, held)]
    assert distance[1] < distance[0]


def test_a_sync_that_skips_a_tensor_is_caught(config, monkeypatch):
    from miles.builtins.fsdp.backend import FsdpBackend

    stream = FsdpBackend.named_weights

    def stale(self):
        """One norm keeps an older value, as if it had not been sent."""
        for group in stream(self):
            yield {
                k: torch.ones_like(v) * 1.5 if k == "model.layers.1.mlp.gate_proj.weight" else v
                for k, v in group.items()
            }

    monkeypatch.setattr(FsdpBackend, "named_weights", stale)
    with pytest.raises(WeightSyncError, match="engine 0 and trainer disagree"):
        miles.train(config)
    run = miles.train(config, weight_sync_verify="never", num_rollout=1, resume="never")
    assert run.status == "completed"


def test_a_failed_run_says_so_in_its_summary(config, run_dir):
    def broken(sample):
        raise ValueError("judge is out")

    with pytest.raises(RolloutError, match="16 of 16 samples failed.*judge is out"):
        miles.train(config, reward=broken)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"


def test_sft_is_a_job_like_any_other(config, run_dir, sums):
    config["data"]["sets"][0] = {"path": str(sums)}
    config |= {
        "algorithm": {"advantage_estimator": "none", "policy_loss": "sft"},
        "rollout": {"engine": "none", "num_rollout": 20, "batch_size": 12, "n_samples_per_prompt": 1},
        "eval": {},
    }
    miles.train(config, num_steps_per_rollout=1)
    loss = [line["train/loss"] for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]
    assert len(loss) == 20
    assert loss[-1] < 0.8 * loss[0]


def test_evaluation_alone_agrees_with_the_run(config, run_dir):
    from miles.config.load import resolve
    from miles.jobs import run_evaluation

    run = miles.train({**config, "checkpoint": {"save_hf": "hf"}})
    last = run.evaluation["heldout"]["last"]
    for checkpoint in (run_dir, run_dir / "hf"):
        alone = run_evaluation(resolve((config,), purpose="eval"), checkpoint)
        assert alone["heldout"]["reward"] == last["reward"]
