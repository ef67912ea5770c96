"""Every hook of miles, in the order they are called: the table of contents of the framework.

Two families. **Registration hooks** run once per process, take no arguments, and return a mapping from names to
`Component`s (a preset: to a config overlay). **Lifecycle hooks** run in the driver at fixed points of a run and return
nothing; they observe, except `miles_modify_samples`, which may edit data. `miles_on_worker_start` is the one that runs
in every worker. Steps count from 0. Within a step, `step` is its index; after it (weight sync, evaluation, checkpoint),
`step` or `version` is the number of completed steps, 0 for the untrained policy.

A plugin implements the hooks it needs as plain functions in its `plugin.py`:

    from miles.api import Component, hookimpl

    @hookimpl
    def miles_register_advantage_estimators():
        return {"grpo": Component("miles_grpo.grpo:grpo", summary="Group-relative advantages")}

Hooks are called per step or per sample, never per token, layer or micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from miles.component import Component
    from miles.config import Config
    from miles.run import Run
    from miles.types import Group, Metrics

PROJECT = "miles"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# ------------------------------------------------------------------------------------------ registration, in data order


@hookspec
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    """Config overlays by name, for `--preset` and for estimators that stand for a whole recipe (`gspo`, `ppo`).

    Called in every process while configuration is resolved. Since API 1.
    """


@hookspec
def miles_register_bridges() -> Mapping[str, Component]:
    """Model families (`miles.protocols.Bridge`); `provides` lists the Hugging Face model types. Since API 1."""


@hookspec
def miles_register_chat_formats() -> Mapping[str, Component]:
    """Conversations as tokens (`ChatFormat`); `provides` lists model types it is the automatic choice for. API 1."""


@hookspec
def miles_register_model_transforms() -> Mapping[str, Component]:
    """Changes to a built model (`ModelTransform`). Since API 1."""


@hookspec
def miles_register_precision_schemes() -> Mapping[str, Component]:
    """Number formats (`PrecisionScheme`). Since API 1."""


@hookspec
def miles_register_routing_replays() -> Mapping[str, Component]:
    """Record and replay of expert choices (`RoutingReplay`). Since API 1."""


@hookspec
def miles_register_train_backends() -> Mapping[str, Component]:
    """One model on one rank (`TrainBackend`). Since API 1."""


@hookspec
def miles_register_rollout_engines() -> Mapping[str, Component]:
    """Generation and scoring (`RolloutEngine`). Since API 1."""


@hookspec
def miles_register_weight_syncs() -> Mapping[str, Component]:
    """Transports from trainer to engine (`WeightSync`). Since API 1."""


@hookspec
def miles_register_executors() -> Mapping[str, Component]:
    """Where workers run (`Executor`). Since API 1."""


@hookspec
def miles_register_data_sources() -> Mapping[str, Component]:
    """Where prompts come from (`DataSource`). Since API 1."""


@hookspec
def miles_register_environments() -> Mapping[str, Component]:
    """Worlds that answer the model (`Environment`). Since API 1."""


@hookspec
def miles_register_generate_functions() -> Mapping[str, Component]:
    """From a fresh sample to a finished one (`GenerateFunction`). Since API 1."""


@hookspec
def miles_register_rewards() -> Mapping[str, Component]:
    """Judges (`Reward` or `GroupReward`). Since API 1."""


@hookspec
def miles_register_sample_filters() -> Mapping[str, Component]:
    """Which groups are trained on (`SampleFilter`). Since API 1."""


@hookspec
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    """Advantages of a rollout batch (`AdvantageEstimator`). Since API 1."""


@hookspec
def miles_register_policy_losses() -> Mapping[str, Component]:
    """Per-token losses (`PolicyLossFunction`). Since API 1."""


@hookspec
def miles_register_loss_masks() -> Mapping[str, Component]:
    """Which tokens a policy loss counts, decided from the new log-probs (`LossMask`). Since API 1."""


@hookspec
def miles_register_is_corrections() -> Mapping[str, Component]:
    """Importance-sampling corrections (`ISCorrection`). Since API 1."""


@hookspec
def miles_register_evaluators() -> Mapping[str, Component]:
    """Held-out measurement (`Evaluator`). Since API 1."""


@hookspec
def miles_register_trackers() -> Mapping[str, Component]:
    """Where metrics go (`Tracker`). Since API 1."""


# --------------------------------------------------------------------------------------------- lifecycle, in call order


@hookspec
def miles_configure(config: Config) -> None:
    """The configuration is resolved and nothing is built yet. Raise `ConfigError` to refuse it. Since API 1."""


@hookspec
def miles_on_worker_start(role: str, rank: int, config: Config) -> None:
    """In every worker process, after it loaded its plugins and before it builds its model. Since API 1."""


@hookspec
def miles_report_header(config: Config) -> str | list[str] | None:
    """Lines for the header of a run's output and report. Since API 1."""


@hookspec
def miles_on_run_start(run: Run) -> None:
    """Everything is built, a checkpoint, if any, is loaded, and no rollout has begun. Since API 1."""


@hookspec
def miles_on_rollout_end(run: Run, step: int, groups: list[Group], metrics: Metrics) -> None:
    """The batch of step `step` (its index) is complete: generated, rewarded, filtered. Read only. Since API 1."""


@hookspec
def miles_modify_samples(run: Run, step: int, groups: list[Group]) -> None:
    """The one hook that may edit data: change `groups` in place before advantages are computed. `step` is the index of
    the step that will train on them. Since API 1.
    """


@hookspec
def miles_on_train_step_end(run: Run, step: int, metrics: Metrics) -> None:
    """All optimizer steps on this batch are done. `step` is the index of the step that is being finished: 0 for the
    first, whose weights will be version 1. Read only. Since API 1.
    """


@hookspec
def miles_on_checkpoint_saved(run: Run, step: int, path: str) -> None:
    """A checkpoint of `step` completed steps is whole and will be found on resumption. Since API 1."""


@hookspec
def miles_on_weight_sync_end(run: Run, version: int, metrics: Metrics) -> None:
    """Every engine serves `version`, the weights after as many completed steps. Since API 1."""


@hookspec
def miles_on_eval_end(run: Run, step: int, metrics: dict[str, Metrics]) -> None:
    """The policy after `step` completed steps was evaluated: set name -> metrics. Since API 1."""


@hookspec
def miles_on_run_end(run: Run, error: BaseException | None) -> None:
    """Once for every run that was built and began to be driven, from the restoring of its checkpoint on, after success,
    failure or interruption (`error`), whether `miles_on_run_start` was reached or not. Since API 1.
    """
