"""Contract tests: what a component of each kind must do, whoever wrote it. A plugin's `tests/test_contract.py`:

    from miles.testing import AdvantageEstimatorContract

    class TestGrpo(AdvantageEstimatorContract):
        name = "grpo"

pytest then runs every standard test of the kind on the component that an installed plugin registers under this name.
Needs pytest (`pip install 'miles[testing]'`). docs/testing-a-plugin.md says what can be set, and how a test that does
not apply is left out with a reason.
"""

import pytest

MODULES = (
    "advantages", "backends", "batches", "bridges", "chat", "contract", "conversations", "data", "engines",
    "environments", "evaluators", "executors", "generating", "golden", "judging", "losses", "models", "presets",
    "syncs", "tiny", "tracking",
)  # fmt: skip
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in MODULES))

from miles.testing.advantages import AdvantageEstimatorContract
from miles.testing.backends import TrainBackendContract
from miles.testing.bridges import BridgeContract
from miles.testing.chat import ChatFormatContract
from miles.testing.contract import ComponentContract, Contract, installed, standard_tests
from miles.testing.data import DataSourceContract
from miles.testing.engines import RolloutEngineContract
from miles.testing.environments import EnvironmentContract
from miles.testing.evaluators import EvaluatorContract
from miles.testing.executors import ExecutorContract
from miles.testing.generating import GenerateFunctionContract
from miles.testing.golden import golden_batch, measured
from miles.testing.judging import RewardContract, SampleFilterContract
from miles.testing.losses import ISCorrectionContract, LossMaskContract, PolicyLossContract
from miles.testing.models import ModelTransformContract, PrecisionSchemeContract, RoutingReplayContract
from miles.testing.presets import PresetContract
from miles.testing.syncs import WeightSyncContract
from miles.testing.tracking import TrackerContract

CONTRACTS: dict[str, type[Contract]] = {
    contract.kind: contract
    for contract in (
        PresetContract,
        BridgeContract,
        ChatFormatContract,
        ModelTransformContract,
        PrecisionSchemeContract,
        RoutingReplayContract,
        TrainBackendContract,
        RolloutEngineContract,
        WeightSyncContract,
        ExecutorContract,
        DataSourceContract,
        EnvironmentContract,
        GenerateFunctionContract,
        RewardContract,
        SampleFilterContract,
        AdvantageEstimatorContract,
        PolicyLossContract,
        LossMaskContract,
        ISCorrectionContract,
        EvaluatorContract,
        TrackerContract,
    )
}
"""Kind -> the contract class of its components."""

__all__ = [
    "CONTRACTS",
    "AdvantageEstimatorContract",
    "BridgeContract",
    "ChatFormatContract",
    "ComponentContract",
    "Contract",
    "DataSourceContract",
    "EnvironmentContract",
    "EvaluatorContract",
    "ExecutorContract",
    "GenerateFunctionContract",
    "ISCorrectionContract",
    "LossMaskContract",
    "ModelTransformContract",
    "PolicyLossContract",
    "PrecisionSchemeContract",
    "PresetContract",
    "RewardContract",
    "RolloutEngineContract",
    "RoutingReplayContract",
    "SampleFilterContract",
    "TrackerContract",
    "TrainBackendContract",
    "WeightSyncContract",
    "golden_batch",
    "installed",
    "measured",
    "standard_tests",
]
