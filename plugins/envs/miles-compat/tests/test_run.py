"""A short run with functions of upstream for everything that they may be."""

from __future__ import annotations

import json
import math

import pytest
from miles_compat.current import current

import miles
from miles.testing import tiny

HELD_OUT = {
    "name": "held_out",
    "generate": {"name": "slime_function", "path": ""},
    "reward": {"name": "slime_function", "path": "judges.as_mapping"},
    "sampling": {"max_new_tokens": 8},
}


class Watch:
    """A plugin that keeps what a run generated."""

    __name__ = "watch"

    def __init__(self):
        self.groups, self.ports = [], set()

    @miles.api.hookimpl
    def miles_on_rollout_end(self, run, step, groups, metrics):
        from miles_compat.namespace import args

        self.groups += groups
        self.ports.add(args().sglang_router_port)


@pytest.fixture
def settings(tmp_path):
    for name in ("train", "test"):
        rows = [{"input": f"add {i} {i}", "label": str(2 * i), "metadata": {"level": i}} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"dir": str(tmp_path / "run"), "report": False},
        "model": {"hf_checkpoint": str(tiny.saved("llama"))},
        "data": {"sets": [{"name": "sums", "path": str(tmp_path / "train.jsonl"), "sampling": {"max_new_tokens": 12}}]},
        "eval": {
            "interval": 1,
            "sets": [HELD_OUT | {"path": str(tmp_path / "test.jsonl@[:2]")}],
        },
        "rollout": {"num_rollout": 2, "batch_size": 2, "n_samples_per_prompt": 3},
        "algorithm": {"advantage_estimator": "grpo"},
        "optimizer": {"lr": 1e-3},
    }


def test_a_run_with_their_functions(settings, tmp_path):
    watch = Watch()
    run = miles.train(
        settings,
        plugins=[watch],
        custom_generate_function_path="retool.generate",
        custom_rm_path="retool.reward_func",
        reward_key="score",
        rollout_sample_hook_path=["several.note_step"],
        rollout_max_context_len=96,
        dump=str(tmp_path / "dump"),
    )
    assert run.step == 2
    samples = [sample for group in watch.groups for sample in group.samples]
    assert len(samples) == 2 * 2 * 3
    for sample in samples:
        assert sample.tokens[: sample.prompt_length] == tiny.tokenizer().encode(f"Tools: add.\n{sample.prompt.text}")
        assert sample.reward in (1.0, -1.0 - 0.1, -1.0 - 0.05, -1.0)
        assert sample.reward_parts["slime_function/acc"] == float(sample.reward > 0)
        said = sample.columns["weight_version"] >= 0
        assert (said == (sample.loss_mask > 0)).all()
        assert all(math.isfinite(value) for value in sample.columns["rollout_log_probs"])
    assert {(s.metadata["hooked"][0], int(s.columns["weight_version"].max())) for s in samples} == {(0, 0), (1, 1)}
    assert all(s.metadata["level"] == s.prompt.metadata["level"] for s in samples)
    assert len(watch.ports) == 1, "one server for the whole run"
    assert current.run is None
    evaluated = run.summary["evaluation"]
    assert "held_out" in json.dumps(evaluated)


@pytest.mark.parametrize(
    "mode",
    [
        {"partial_rollout": True, "over_sampling_batch_size": 4},
        {"mode": "fully_async", "max_weight_staleness": 1, "pause_mode": "abort"},
    ],
    ids=["partial", "fully_async"],
)
def test_the_modes_of_rollouts(settings, mode):
    """Functions that are aborted, or whose answers new weights cut in two: every token keeps a version of its own."""
    watch = Watch()
    run = miles.train(
        {**settings, "eval": {}, "rollout": {**settings["rollout"], "num_rollout": 4, **mode}},
        plugins=[watch],
        custom_generate_function_path="single.generate",
        custom_rm_path="judges.at_once",
    )
    assert run.step == 4
    samples = [sample for group in watch.groups for sample in group.samples]
    assert len(samples) == 4 * 2 * 3
    for sample in samples:
        versions = sample.columns["weight_version"]
        assert ((versions >= 0) == (sample.loss_mask > 0)).all()
        assert sample.trainable_tokens == sample.response_length
        assert sample.error is None


def test_engine_and_trainer_agree_on_what_went_through_the_function(settings):
    """The trainer computes the log-probs of the tokens anew: columns that had slipped by one would differ by nats."""
    run = miles.train(
        {**settings, "eval": {}}, custom_generate_function_path="search.generate", custom_rm_path="judges.at_once"
    )
    assert run.metrics["train/train_rollout_logprob_abs_diff"] < 1e-3, sorted(run.metrics)
