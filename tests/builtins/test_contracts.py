"""The built-in components keep the contracts of their kinds."""

import json

import torch

from miles.api import Action, ToolCall
from miles.testing import (
    ChatFormatContract,
    DataSourceContract,
    EnvironmentContract,
    EvaluatorContract,
    ExecutorContract,
    GenerateFunctionContract,
    PolicyLossContract,
    PrecisionSchemeContract,
    PresetContract,
    RewardContract,
    RolloutEngineContract,
    SampleFilterContract,
    TrackerContract,
    TrainBackendContract,
    WeightSyncContract,
)


class TestSftPreset(PresetContract):
    name = "sft"


class TestTemplate(ChatFormatContract):
    name = "template"
    takes_reasoning = True


class TestPlain(PrecisionSchemeContract):
    name = "plain"


class TestFsdp(TrainBackendContract):
    name = "fsdp"


class TestTorchEngine(RolloutEngineContract):
    name = "torch"


class TestNoEngine(RolloutEngineContract):
    name = "none"


class TestInProcessSync(WeightSyncContract):
    name = "inprocess"


class TestBroadcastSync(WeightSyncContract):
    name = "broadcast"
    executor = "local"
    senders = 2


class TestDiskSync(WeightSyncContract):
    name = "disk"
    executor = "local"
    senders = 2


class TestDiskSyncOfChanges(WeightSyncContract):
    name = "disk"
    options = {"mode": "delta"}


class TestRollout(EvaluatorContract):
    name = "rollout"


class TestInProcess(ExecutorContract):
    name = "inprocess"
    sizes = (1,)


class TestFiles(DataSourceContract):
    name = "files"


class TestTools(EnvironmentContract):
    name = "tools"
    options = {"functions": ["miles.testing.environments:add"]}
    bad_options = [{"functions": [], "timeout": 0.0}, {"functions": [], "max_result_length": 0}]
    actions = [Action("", tool_calls=(ToolCall("add", {"a": 1, "b": 2}, "call_0"),) * 2), Action("3")]
    ends = True
    rewards = [None, None]


class TestSingleTurn(GenerateFunctionContract):
    name = "single_turn"


class TestMultiTurn(GenerateFunctionContract):
    name = "multi_turn"


class TestDataset(GenerateFunctionContract):
    name = "dataset"
    trains = "responses"


class TestJsonl(TrackerContract):
    name = "jsonl"

    def logged(self, folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len({row["step"] for row in rows}) == len(rows)
        return {row.pop("step"): row for row in rows}


class TestTensorboard(TrackerContract):
    name = "tensorboard"


class TestPpoClip(PolicyLossContract):
    name = "ppo_clip"
    bad_options = [{"eps": -0.1}, {"eps_high": -1.0}, {"eps_clip_c": 1.0}]


class TestPpoDualClip(PolicyLossContract):
    name = "ppo_clip"
    options = {"eps": 0.2, "eps_high": 0.28, "eps_clip_c": 3.0}


class TestReinforce(PolicyLossContract):
    name = "reinforce"


class TestSft(PolicyLossContract):
    name = "sft"

    def on_policy_gradient(self, inputs):
        """Cross-entropy: advantages play no part."""
        return torch.full_like(inputs.advantages_T, -1.0)


class TestEnvironmentReward(RewardContract):
    name = "environment"
    cases = [("anything", None, 0.5)]
    bad_options = [{"min": 1.0, "max": 0.0}]


class TestAgreeingRewards(SampleFilterContract):
    name = "agreeing_rewards"
    kept = [[1.0, 0.0], [0.5, 0.5, 0.6]]
    dropped = [[1.0, 1.0], [0.0], []]
