"""The kinds of components: where each stands in a config, which protocol it has, how it is called."""

from __future__ import annotations

from dataclasses import dataclass

from miles import protocols


@dataclass(frozen=True)
class Kind:
    """One kind of component."""

    name: str
    """As in the hook `miles_register_<name>`."""
    keys: tuple[str, ...]
    """Where the config names one: dotted paths, `*` standing for each task set."""
    protocol: type | None
    """None for presets, which are data."""
    words: tuple[str, ...] = ()
    """Names with a meaning of their own in the core: `auto` (chosen by what else is there) and `none` (nothing)."""

    @property
    def singular(self) -> str:
        """As sentences say it."""
        irregular = {"policy_losses": "policy loss", "is_corrections": "IS correction"}
        return irregular.get(self.name, self.name.removesuffix("s").replace("_", " "))

    @property
    def word(self) -> str:
        """As commands say it: `policy-loss`."""
        return self.singular.lower().replace(" ", "-")


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("presets", ("algorithm.preset",), None),
        Kind("bridges", ("model.bridge",), protocols.Bridge, ("auto",)),
        Kind("chat_formats", ("data.chat_format",), protocols.ChatFormat, ("auto",)),
        Kind("model_transforms", ("model.transforms",), protocols.ModelTransform),
        Kind("precision_schemes", ("precision.scheme",), protocols.PrecisionScheme),
        Kind("routing_replays", ("moe.routing_replay",), protocols.RoutingReplay, ("none",)),
        Kind("train_backends", ("train.train_backend",), protocols.TrainBackend),
        Kind("rollout_engines", ("rollout.engine", "teacher.engine"), protocols.RolloutEngine),
        Kind("weight_syncs", ("weight_sync.transport",), protocols.WeightSync, ("auto",)),
        Kind("executors", ("resources.executor",), protocols.Executor, ("auto",)),
        Kind("data_sources", ("data.source",), protocols.DataSource),
        Kind("environments", ("data.sets.*.environment", "eval.sets.*.environment"), protocols.Environment),
        Kind(
            "generate_functions",
            ("data.sets.*.generate", "eval.sets.*.generate"),
            protocols.GenerateFunction,
            ("auto",),
        ),
        Kind("rewards", ("data.sets.*.reward", "eval.sets.*.reward", "data.reward_terms"), protocols.Reward),
        Kind("sample_filters", ("rollout.filters",), protocols.SampleFilter),
        Kind(
            "advantage_estimators",
            ("algorithm.advantage_estimator", "algorithm.advantage_terms"),
            protocols.AdvantageEstimator,
            ("none",),
        ),
        Kind("policy_losses", ("algorithm.policy_loss",), protocols.PolicyLossFunction),
        Kind("loss_masks", ("algorithm.loss_masks",), protocols.LossMask),
        Kind("is_corrections", ("algorithm.is_correction",), protocols.ISCorrection, ("none",)),
        Kind("evaluators", ("eval.evaluator",), protocols.Evaluator),
        Kind("trackers", ("tracking",), protocols.Tracker),
    )
}
