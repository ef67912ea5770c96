"""The whole configuration: one field a section."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from miles.config.algorithm import AlgorithmSection
from miles.config.base import ComponentSpecs, Flag, Section, Spec
from miles.config.critic import CriticSection
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
from miles.config.teacher import TeacherSection
from miles.config.train import TrainSection

METRICS_FILE = Spec(name="jsonl")


def with_metrics_file(trackers: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """Every run directory has its `metrics.jsonl`, whatever else is asked for."""
    return trackers if any(spec.name == METRICS_FILE.name for spec in trackers) else (METRICS_FILE, *trackers)


class Config(Section):
    """A run, completely described. Frozen: what is derived from it is computed in `miles.config.derived`."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    critic: CriticSection = CriticSection()
    teacher: TeacherSection = TeacherSection()
    precision: PrecisionSection = PrecisionSection()
    moe: MoeSection = MoeSection()
    weight_sync: WeightSyncSection = WeightSyncSection()
    resources: ResourcesSection = ResourcesSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: Annotated[ComponentSpecs, Flag("--tracking"), AfterValidator(with_metrics_file)] = ()
    """Where metrics go besides the progress line and `metrics.jsonl`: tensorboard, wandb."""
    plugins: PluginsSection = PluginsSection()

    @property
    def rollout_temperature(self) -> float:
        """Of all training sets, which have the same: the trainer's logits are divided by it."""
        return self.data.sets[0].sampling.temperature if self.data.sets else 1.0

    @property
    def exact(self) -> bool:
        """Whether two runs are to be compared bit for bit, at the price of speed."""
        return self.run.deterministic or self.train.reproducible_ranks is not None

    @property
    def on_policy(self) -> bool:
        """Whether all samples of a batch are drawn by the very weights that are trained on them."""
        in_waves = self.rollout.mode == "sync" and not self.rollout.partial_rollout
        return self.weight_sync.interval == 1 and (in_waves or self.rollout.most_staleness == 0)
