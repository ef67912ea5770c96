"""The whole configuration: one field a section."""

from __future__ import annotations

from typing import Annotated

from miles.config.algorithm import AlgorithmSection
from miles.config.base import ComponentSpecs, Flag, Section, Spec
from miles.config.data import DataSection
from miles.config.model import ModelSection
from miles.config.optimizer import OptimizerSection
from miles.config.rollout import RolloutSection
from miles.config.run import RunSection
from miles.config.system import (
    CheckpointSection,
    EvalSection,
    MoeSection,
    PluginsSection,
    PrecisionSection,
    ResourcesSection,
    WeightSyncSection,
)
from miles.config.train import TrainSection


class Config(Section):
    """A run, completely described. Frozen: what is derived from it is computed in `miles.config.derived`."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    precision: PrecisionSection = PrecisionSection()
    moe: MoeSection = MoeSection()
    weight_sync: WeightSyncSection = WeightSyncSection()
    resources: ResourcesSection = ResourcesSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: Annotated[ComponentSpecs, Flag("--tracking")] = (Spec(name="jsonl"),)
    """Where metrics go, besides the progress line: jsonl, tensorboard, wandb."""
    plugins: PluginsSection = PluginsSection()
