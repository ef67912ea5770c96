"""The main job through plugins only: what it writes, and that what it writes is true."""

import gc
import json
import threading
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

import miles
from miles.api import LOSS_MASK, ROLLOUT_LOG_PROBS, Status, hookimpl
from miles.errors import RolloutError, WeightSyncError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def test_a_run_leaves_a_complete_directory(config, run_dir, caplog):
    caplog.set_level("INFO", "miles")
    run = miles.train(config)
    assert caplog.messages[-2:] == [f"completed: 2 steps; everything is in {run_dir}", f"report: {run_dir}/report.html"]
    assert run.status == "completed"
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "config.yaml",
        "plugins.json",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "summary.json",
        "report.html",
    } <= names
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
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step_000001", "step_000002"]


def test_what_a_run_was_made_of_goes_with_it(config):
    run = miles.train(config, num_rollout=1)
    model = weakref.ref(run.parts.workers.links[0].host.objects["0"].models["actor"].scorer)
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


def test_rollouts_on_disk_say_what_training_made_of_them(config, run_dir):
    miles.train(config)
    for line in lines(run_dir / "metrics.jsonl")[1:]:
        samples = lines(run_dir / f"rollouts/step_{line['step']:06d}.jsonl")
        # Rollouts count the same and the two optimizer steps have as many each: the metric is the mean over samples.
        assert np.mean([s["loss"] for s in samples]) == pytest.approx(line["train/pg_loss"], abs=2e-5)
        for start in range(0, 16, 4):
            rewards = np.array([s["reward"] for s in samples[start : start + 4]])
            expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            for s, value in zip(samples[start : start + 4], expected, strict=True):
                n = s["prompt_length"]
                assert s["advantages"][:n] == [0] * n
                assert s["advantages"][n:] == pytest.approx([value] * (len(s["tokens"]) - n), abs=1e-4)


def test_samples_of_a_step_that_fails_are_on_disk(config, run_dir, monkeypatch):
    async def fails(self, model, table):
        raise RuntimeError("no optimizer today")

    monkeypatch.setattr("miles.training.trainer.Trainer._optimize", fails)
    with pytest.raises(RuntimeError, match="no optimizer today"):
        miles.train(config)
    samples = lines(run_dir / "rollouts" / "step_000001.jsonl")
    assert len(samples) == 16
    assert all(len(s["advantages"]) == len(s["tokens"]) and s["loss"] is None for s in samples)


def test_learning_rate_zero_changes_nothing(config, run_dir, checkpoint):
    miles.train({**config, "optimizer": {"lr": 0.0}, "checkpoint": {"save_hf": "hf/{step}"}})
    before, after = load_file(checkpoint / "model.safetensors"), load_file(run_dir / "hf/2/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_in_fp64(config, run_dir):
    """Trainer and engine; the engine says its log-probabilities in float32."""
    config["train"] = {**config.get("train", {}), "dtype": "fp64"}
    miles.train(config, num_rollout=2, run_dir=str(run_dir))
    found = [line["train/train_rollout_logprob_abs_diff"] for line in lines(run_dir / "metrics.jsonl") if line["step"]]
    assert all(0 < difference < 1e-6 for difference in found)
    exported = run_dir / "checkpoints/step_000002/actor"
    saved = FileSystemReader(exported).read_metadata().state_dict_metadata
    assert {e.properties.dtype for n, e in saved.items() if n.startswith("parameter/")} == {torch.float64}


def test_what_a_mask_leaves_out_teaches_nothing(config, run_dir):
    def upward(inputs):
        return inputs.advantages_T >= 0

    def downward(inputs):
        return inputs.advantages_T <= 0

    miles.train({**config, "rollout": {**config["rollout"], "num_rollout": 1}}, loss_masks=[upward, downward])
    (metrics,) = [m for m in lines(run_dir / "metrics.jsonl") if "train/pg_loss" in m]
    assert metrics["train/pg_loss"] == metrics["train/grad_norm"] == 0
    assert metrics["train/advantage_abs"] > 0
    shares = [value for name, value in metrics.items() if name.endswith("_masked")]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


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
        miles.train({**config, "eval": {}}, reward=broken)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"].startswith("RolloutError: 16 of 16 samples failed")
    samples = lines(run_dir / "rollouts" / "step_000001.jsonl")
    assert [s["id"] for s in samples] == list(range(16))
    assert {s["status"] for s in samples} == {"failed"}
    assert all("judge is out" in s["error"] and s["response"] and "advantages" not in s for s in samples)
    assert (run_dir / "report.html").exists()


def test_a_batch_that_does_not_get_full_is_on_disk_once(config, run_dir):
    """Failed samples come first, then those that were fine; step 1 was trained and stays as it was."""

    def worse(sample):
        if sample.id >= 16 and sample.id % 4:
            raise ValueError("judge is out")
        return float(sample.id % 2)

    with pytest.raises(RolloutError, match="12 of 16 samples failed"):
        miles.train({**config, "eval": {}}, reward=worse)
    first, second = (lines(run_dir / "rollouts" / f"step_00000{n}.jsonl") for n in (1, 2))
    assert all(s["loss"] is not None for s in first)
    fine = [16, 20, 24, 28]
    assert [s["id"] for s in second] == [i for i in range(16, 32) if i not in fine] + fine
    assert [s["status"] == "failed" for s in second] == [True] * 12 + [False] * 4


def test_groups_that_filters_reject_are_on_disk(config, run_dir):
    config["rollout"] |= {"filters": ["agreeing_rewards"], "max_filtered_batches": 2, "dump_samples": 20}
    with pytest.raises(RolloutError, match="8 groups were generated and only 0 of 4 passed"):
        miles.train({**config, "eval": {}}, reward=lambda sample: 1.0)
    assert [s["id"] for s in lines(run_dir / "rollouts" / "step_000001.jsonl")] == list(range(20))


def test_a_run_without_a_report(config, run_dir):
    miles.train(config, num_rollout=0, report=False)
    assert (run_dir / "summary.json").exists()
    assert not (run_dir / "report.html").exists()


def test_failures_are_no_successes_in_an_evaluation(config):
    def half(sample):
        if sample.id % 2:
            raise ValueError("judge is out")
        return 1.0

    run = miles.train(config, reward=half, num_rollout=0)
    first = run.evaluation["heldout"]["first"]
    assert (first["accuracy"], first["failed_ratio"], first["reward"]) == (0.5, 0.5, 1.0)


def threads():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("miles")}


def test_a_build_that_fails_leaves_nothing_behind(config, run_dir, tmp_path, monkeypatch):
    before = threads()
    (tmp_path / "refusal.py").write_text(
        "class Refusal:\n    def __init__(self):\n        raise RuntimeError('no evaluator today')\n"
        "    async def evaluate(self, run, step):\n        return {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config["eval"]["evaluator"] = "refusal:Refusal"
    with pytest.raises(RuntimeError, match="no evaluator today"):
        miles.train(config)
    assert threads() == before
    assert json.loads((run_dir / "summary.json").read_text())["error"] == "RuntimeError: no evaluator today"


def test_a_hook_that_fails_at_the_end_does_not_hide_the_error_or_leak(config, run_dir):
    class Rude:
        @hookimpl
        def miles_on_train_step_end(self, step):
            raise RuntimeError("first")

        @hookimpl
        def miles_on_run_end(self, error):
            raise RuntimeError(f"second, after {error}")

    before = threads()
    with pytest.raises(RuntimeError, match="^first"):
        miles.train(config, plugins=[Rude()])
    assert threads() == before


def test_hooks_come_in_their_order(config):
    calls = []

    class Witness:
        @hookimpl
        def miles_configure(self, config):
            calls.append("configure")

        @hookimpl
        def miles_on_worker_start(self, role, rank):
            calls.append(f"worker {role} {rank}")

        @hookimpl
        def miles_on_run_start(self, run):
            calls.append("start")

        @hookimpl
        def miles_on_rollout_end(self, step, groups):
            calls.append(f"rollout {step}")

        @hookimpl
        def miles_modify_samples(self, step, groups):
            calls.append(f"modify {step}")

        @hookimpl
        def miles_on_train_step_end(self, step):
            calls.append(f"train {step}")

        @hookimpl
        def miles_on_checkpoint_saved(self, step):
            calls.append(f"saved {step}")

        @hookimpl
        def miles_on_weight_sync_end(self, version):
            calls.append(f"sync {version}")

        @hookimpl
        def miles_on_eval_end(self, step):
            calls.append(f"eval {step}")

        @hookimpl
        def miles_on_run_end(self, error):
            calls.append(f"end {error}")

    miles.train(config, plugins=[Witness()], num_rollout=1)
    assert calls == [
        "configure", "worker train 0", "start", "sync 0", "eval 0", "rollout 0", "modify 0", "train 0", "saved 1",
        "sync 1", "eval 1", "end None",
    ]  # fmt: skip


def test_a_hook_may_edit_samples(config, run_dir):
    class Zero:
        @hookimpl
        def miles_modify_samples(self, groups):
            for group in groups:
                for sample in group.samples:
                    sample.reward = 0.0

    miles.train(config, plugins=[Zero()], num_rollout=1)
    assert lines(run_dir / "metrics.jsonl")[-1]["train/grad_norm"] == 0


def test_samples_that_nobody_rewarded_are_no_zeros(config, sums):
    async def forgetful(context, sample):
        sample.append([49], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: -1.0})
        sample.status = Status.COMPLETED
        return sample

    config["data"]["sets"][0] = {"path": str(sums), "generate": forgetful}
    with pytest.raises(RolloutError, match="nobody rewarded it"):
        miles.train({**config, "eval": {}})


def test_kl_in_the_reward_reaches_an_estimator_that_knows_only_rewards(config, tmp_path):
    def weights(name, **flags):
        flags |= {"run_dir": str(tmp_path / name), "num_rollout": 3, "lr": 3e-3, "eval_before_train": False}
        miles.train(config, save_hf="hf", **flags)
        return load_file(tmp_path / name / "hf" / "model.safetensors")

    free, held = weights("free"), weights("held", kl_coef=1.0)
    start = load_file(f"{config['model']['hf_checkpoint']}/model.safetensors")
    moved = [sum(float((m[k] - start[k]).norm()) for k in start) for m in (free, held)]
    assert moved[0] != moved[1]


def test_starting_from_another_run_takes_its_weights_alone(config, tmp_path):
    schedule = {"lr_decay_style": "linear", "num_rollout": 2}
    miles.train(config, run_dir=str(tmp_path / "first"), save_hf="hf", **schedule)
    run = miles.train(config, run_dir=str(tmp_path / "second"), load=str(tmp_path / "first"), **schedule)
    second = lines(tmp_path / "second" / "metrics.jsonl")
    assert run.resumed_from is None
    assert second[1]["train/lr"] > 0
    assert second[0]["eval/heldout/reward"] == lines(tmp_path / "first" / "metrics.jsonl")[-1]["eval/heldout/reward"]


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
    only_eval = {key: config[key] for key in ("run", "model", "eval")} | {"resources": {"colocate": True}}
    for checkpoint in (run_dir, run_dir / "hf"):
        alone = run_evaluation(resolve((only_eval,), purpose="eval"), checkpoint)
        assert alone["heldout"]["reward"] == last["reward"]


def test_an_error_has_no_other_one_before_it(config):
    with pytest.raises(RolloutError) as caught:
        miles.train(config, reward=lambda sample: float("nan"))
    assert "event loop" not in str(caught.value.__context__)
