"""A run with a critic: both models learn, are saved together, and go on bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import miles
from miles.api import Component, ConfigError, TrainError, hookimpl

VALUED = """
import torch
from miles.api import Advantages
from miles.toolkit import per_token

def valued(inputs):
    returns_T = per_token(inputs.rewards_N, inputs)
    return Advantages((returns_T - inputs.values_T) * inputs.mask_T, returns_T)

def silent(inputs):
    return inputs.values_T * inputs.mask_T
"""


class Plugin:
    @hookimpl
    def miles_register_advantage_estimators(self):
        return {name: Component(f"valued:{name}", needs={"critic"}) for name in ("valued", "silent")}


@pytest.fixture
def train(config, tmp_path, monkeypatch):
    """`train(run directory, section=..., ...)`: four steps with a critic; returns metrics of each."""
    (tmp_path / "valued.py").write_text(VALUED)
    monkeypatch.syspath_prepend(tmp_path)
    config["algorithm"]["advantage_estimator"] = "valued"
    config["eval"] = {}
    config["rollout"]["num_rollout"] = 4
    config["optimizer"]["lr"] = 3e-3

    def start(name, **sections):
        changed = {key: {**config.get(key, {}), **value} for key, value in sections.items()}
        changed["run"] = {**config["run"], "dir": str(tmp_path / name)}
        miles.train({**config, **changed}, plugins=[Plugin()])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["step"]]

    return start


def state(run_dir, model, step):
    file = run_dir / f"{model}-{step}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step_{step:06d}" / model, file)
    return torch.load(file)


def test_both_learn_and_a_run_that_stopped_goes_on_bit_for_bit(train, tmp_path):
    whole = train("whole")
    assert {line["critic/lr"] for line in whole} == {3e-3}
    assert whole[-1]["critic/value_loss"] < whole[0]["critic/value_loss"]
    assert all("critic/explained_variance" in line and line["critic/grad_norm"] > 0 for line in whole)
    train("parts", rollout={"num_rollout": 2})
    again = train("parts")
    assert [line["critic/value_loss"] for line in again] == [line["critic/value_loss"] for line in whole]
    for model in ("actor", "critic"):
        one, two = (state(tmp_path / name, model, 4) for name in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_critic_begins_alone_with_its_own_learning_rate(train, tmp_path, checkpoint):
    first, second, *_ = train("alone", critic={"only_steps": 1, "lr": 1e-2}, checkpoint={"interval": 1, "keep": 9})
    assert "train/grad_norm" not in first
    assert "train/grad_norm" in second
    assert (first["critic/lr"], second["train/lr"]) == (1e-2, 3e-3)
    parameters = [n for n in state(tmp_path / "alone", "actor", 1) if n.startswith("parameter/")]
    saved = [state(tmp_path / "alone", "actor", step) for step in (1, 2)]
    start = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[0][n], start[n.removeprefix("parameter/lm.")]) for n in parameters)
    assert not all(torch.equal(saved[0][n], saved[1][n]) for n in parameters)


def test_a_run_without_a_critic_gives_its_policy_to_the_critic(train, tmp_path):
    train("policy", algorithm={"advantage_estimator": "grpo"}, rollout={"num_rollout": 1})
    train("after", checkpoint={"load": str(tmp_path / "policy")}, critic={"lr": 0.0}, rollout={"num_rollout": 1})
    policy, critic = state(tmp_path / "policy", "actor", 1), state(tmp_path / "after", "critic", 1)
    shared = [name for name in critic if name in policy and name.startswith("parameter/lm.")]
    assert len(shared) > 10
    assert all(torch.equal(policy[name], critic[name]) for name in shared)


def test_an_estimator_without_returns_is_named(train):
    with pytest.raises(TrainError, match="'silent' needs a critic and returned no returns"):
        train("silent", algorithm={"advantage_estimator": "silent"})


def test_settings_of_a_critic_that_is_not_there_are_refused(train):
    with pytest.raises(ConfigError, match=r"critic\.lr"):
        train("none", algorithm={"advantage_estimator": "grpo"}, critic={"lr": 0.1})
