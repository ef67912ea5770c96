"""What the built-in components are called. They arrive through the same hooks as every plugin's."""

from __future__ import annotations

from miles.api import Component, hookimpl
from miles.builtins.options import DiskOptions, EnvironmentRewardOptions, PpoClipOptions, TemplateOptions, ToolsOptions
from miles.builtins.torch_engine.options import TorchEngineOptions

MILES_API = 1


@hookimpl
def miles_register_presets():
    return {
        "sft": {
            "algorithm": {"advantage_estimator": "none", "policy_loss": "sft"},
            "rollout": {"engine": "none", "n_samples_per_prompt": 1},
            "weight_sync": {"verify": "never"},
        }
    }


@hookimpl
def miles_register_chat_formats():
    return {
        "template": Component(
            "miles.builtins.chat_template:TemplateChat",
            options=TemplateOptions,
            provides=("any",),
            summary="Whatever the tokenizer's own chat template says",
        )
    }


@hookimpl
def miles_register_precision_schemes():
    return {
        "plain": Component("miles.builtins.plain_precision:PlainPrecision", summary="fp32, or bf16 with fp32 masters")
    }


@hookimpl
def miles_register_train_backends():
    return {
        "fsdp": Component(
            "miles.builtins.fsdp.backend:FsdpBackend",
            summary="A Hugging Face model; sharded by FSDP2 where an executor starts several ranks",
        )
    }


@hookimpl
def miles_register_rollout_engines():
    return {
        "torch": Component(
            "miles.builtins.torch_engine.engine:TorchEngine",
            options=TorchEngineOptions,
            provides=("responses",),
            summary="In process: continuous batching, prefix cache",
        ),
        "none": Component("miles.builtins.no_engine:NoEngine", summary="Generates nothing: for SFT on given text"),
    }


@hookimpl
def miles_register_weight_syncs():
    return {
        "inprocess": Component(
            "miles.builtins.inprocess_sync:InProcessSync",
            provides=("beside",),
            summary="Engines beside the train ranks: tensors are handed over in one process",
        ),
        "broadcast": Component(
            "miles.builtins.broadcast_sync:BroadcastSync",
            provides=("apart",),
            summary="To engines in processes of their own: gloo from a CPU, NCCL from a GPU",
        ),
        "disk": Component(
            "miles.builtins.disk_sync:DiskSync",
            options=DiskOptions,
            provides=("beside", "apart", "elsewhere"),
            flags={
                "--update-weight-disk-dir": "dir",
                "--update-weight-mode": "mode",
                "--update-weight-delta-encoding": "encoding",
            },
            summary="By way of files: whole checkpoints, or what has changed",
        ),
    }


@hookimpl
def miles_register_executors():
    return {
        "inprocess": Component(
            "miles.builtins.inprocess:InProcessExecutor",
            provides=("one rank",),
            summary="One worker, in this process",
        ),
        "local": Component(
            "miles.builtins.local:LocalExecutor",
            provides=("one node",),
            summary="A process of this machine for every worker",
        ),
    }


@hookimpl
def miles_register_data_sources():
    return {"files": Component("miles.builtins.files:FileSource", summary="JSONL, Parquet and hub data sets")}


@hookimpl
def miles_register_environments():
    return {
        "tools": Component(
            "miles.builtins.tools:Tools",
            options=ToolsOptions,
            summary="Python functions that the model may call, several at once",
        )
    }


@hookimpl
def miles_register_generate_functions():
    return {
        "single_turn": Component(
            "miles.builtins.generate:single_turn", provides=("one turn",), summary="One response to one prompt"
        ),
        "multi_turn": Component(
            "miles.builtins.generate:MultiTurn",
            needs={"environment"},
            provides=("turns",),
            summary="Model and environment take turns",
        ),
        "dataset": Component(
            "miles.builtins.generate:dataset", provides=("given responses",), summary="The response is in the data: SFT"
        ),
    }


@hookimpl
def miles_register_rewards():
    return {
        "environment": Component(
            "miles.builtins.environment_reward:EnvironmentReward",
            options=EnvironmentRewardOptions,
            needs={"environment"},
            summary="What the environment paid, reduced over the turns",
        )
    }


@hookimpl
def miles_register_sample_filters():
    return {
        "agreeing_rewards": Component(
            "miles.builtins.filters:agreeing_rewards",
            summary="Drop groups whose rewards all agree",
            paper="arXiv:2503.14476",
        )
    }


@hookimpl
def miles_register_policy_losses():
    return {
        "ppo_clip": Component(
            "miles.builtins.losses:ppo_clip",
            options=PpoClipOptions,
            needs={"advantages"},
            flags={"--eps-clip": "eps", "--eps-clip-high": "eps_high", "--eps-clip-c": "eps_clip_c"},
            summary="Clipped surrogate; clip-higher and dual clip by option",
            paper="arXiv:1707.06347",
        ),
        "reinforce": Component("miles.builtins.losses:reinforce", needs={"advantages"}, summary="-A log p"),
        "sft": Component("miles.builtins.losses:sft", provides=("without rewards",), summary="-log p"),
    }


@hookimpl
def miles_register_evaluators():
    return {"rollout": Component("miles.evaluate:RolloutEvaluator", summary="Samples from the live engines")}


@hookimpl
def miles_register_trackers():
    return {
        "jsonl": Component("miles.builtins.trackers:JsonlTracker", summary="metrics.jsonl in the run directory"),
        "tensorboard": Component("miles.builtins.trackers:TensorboardTracker", summary="TensorBoard event files"),
    }


@hookimpl
def miles_on_train_step_end(run, step, metrics):
    from miles.builtins.notices import nothing_learned

    nothing_learned(run, step, metrics)
