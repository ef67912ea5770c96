"""PPO by its name: policy and critic learn, and the critic starts where it is told to."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import miles


def low(sample):
    """How much of the answer is tokens of low numbers; and 1 more for sums of two digits, whatever the answer."""
    response = sample.tokens[sample.prompt_length :]
    return sum(token < 128 for token in response) / len(response) + float(sample.prompt_length > 4)


@pytest.fixture
def train(config, tmp_path):
    """`train(run directory, flag=value, ...)`: every prompt in every step; returns metrics of each."""
    del config["algorithm"], config["eval"]
    config["data"]["sets"][0]["reward"] = low
    config["rollout"].update(batch_size=24, n_samples_per_prompt=4)

    def start(name, **flags):
        miles.train(config, run_dir=str(tmp_path / name), **flags)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["step"]]

    return start


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_policy_and_critic_learn(train):
    rows = train("run", advantage_estimator="ppo", num_rollout=16, lr=1e-2, critic_lr=1e-2, num_critic_only_steps=2)
    assert mean(rows[-3:], "rollout/reward") > mean(rows[:3], "rollout/reward") + 0.15
    assert mean(rows[-3:], "critic/value_loss") < mean(rows[:3], "critic/value_loss") / 3
    assert rows[0]["critic/explained_variance"] < 0.2
    assert mean(rows[-3:], "critic/explained_variance") > 0.6


def test_the_critic_starts_from_another_policy(train, tmp_path):
    train("first", num_rollout=1, save_hf="hf", lr=1e-2)
    train("second", advantage_estimator="ppo", num_rollout=1, critic_load=str(tmp_path / "first/hf"), critic_lr=0.0)
    policy = load_file(tmp_path / "first/hf/model.safetensors")
    dcp_to_torch_save(tmp_path / "second/checkpoints/step_000001/critic", tmp_path / "critic.pt")
    critic = torch.load(tmp_path / "critic.pt")
    trunk = {name: tensor for name, tensor in critic.items() if name.startswith("parameter/lm.")}
    assert len(trunk) > 10
    assert all(torch.equal(tensor, policy[name.removeprefix("parameter/lm.")]) for name, tensor in trunk.items())
