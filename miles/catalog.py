"""Which distribution of ours provides a name, so that an unknown one is answered with what to install.

Kinds and names as in `miles_register_<kind>`. A test compares this table with what the repository's plugins register.
"""

from __future__ import annotations

PROVIDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "advantage_estimators": {
        "miles-grpo": ("grpo", "dr_grpo"),
        "miles-rloo": ("rloo",),
        "miles-reinforce-plus-plus": ("reinforce_plus_plus", "reinforce_plus_plus_baseline"),
        "miles-ppo": ("gae",),
        "miles-remax": ("remax",),
        "miles-maxrl": ("maxrl",),
        "miles-distillation": ("distillation",),
    },
    "policy_losses": {
        "miles-gspo": ("gspo",),
        "miles-cispo": ("cispo",),
        "miles-sapo": ("sapo",),
        "miles-dppo": ("dppo_tv",),
        "miles-distillation": ("distill_topk", "distill_full"),
    },
    "loss_masks": {"miles-opsm": ("opsm",)},
    "presets": {
        "miles-ppo": ("ppo",),
        "miles-gspo": ("gspo",),
        "miles-cispo": ("cispo",),
        "miles-sapo": ("sapo",),
        "miles-dppo": ("dppo",),
        "miles-dapo": ("dapo",),
        "miles-is-corrections": ("bypass", "decoupled_ppo"),
        "miles-distillation": ("distill_full", "distill_topk"),
    },
    "is_corrections": {"miles-is-corrections": ("tis", "mis", "icepop", "m2po")},
    "bridges": {"miles-qwen": ("qwen",), "miles-llama": ("llama",)},
    "chat_formats": {"miles-qwen": ("qwen3",)},
    "rewards": {
        "miles-math": ("exact_match", "math"),
        "miles-dapo": ("soft_overlong",),
        "miles-search-r1": ("search_r1",),
        "miles-compat": ("slime_function",),
        "miles-retool": ("retool",),
        "miles-openreward": ("openreward",),
    },
    "environments": {
        "miles-retool": ("retool",),
        "miles-search-r1": ("search_r1",),
        "miles-openreward": ("openreward",),
    },
    "sample_filters": {"miles-compat": ("slime_function",)},
    "routing_replays": {"miles-routing-replay": ("r2", "r3")},
    "precision_schemes": {"miles-fp8": ("fp8",), "miles-int4": ("int4",)},
    "model_transforms": {"miles-lora": ("lora",)},
    "generate_functions": {"miles-gateway": ("agent",), "miles-compat": ("slime_function",)},
    "rollout_engines": {"miles-sglang": ("sglang", "sglang_external"), "miles-distillation": ("scoring_server",)},
    "train_backends": {"miles-megatron": ("megatron",)},
    "executors": {"miles-ray": ("ray",)},
    "trackers": {"miles-wandb": ("wandb",)},
}

MADE = frozenset(
    {
        "miles-cispo",
        "miles-compat",
        "miles-dapo",
        "miles-distillation",
        "miles-dppo",
        "miles-gateway",
        "miles-grpo",
        "miles-gspo",
        "miles-is-corrections",
        "miles-llama",
        "miles-math",
        "miles-maxrl",
        "miles-openreward",
        "miles-opsm",
        "miles-ppo",
        "miles-qwen",
        "miles-ray",
        "miles-reinforce-plus-plus",
        "miles-remax",
        "miles-retool",
        "miles-rloo",
        "miles-sapo",
        "miles-search-r1",
        "miles-sglang",
        "miles-wandb",
    }
)
"""Those of these distributions that exist in this version."""


def provider(kind: str, name: str) -> str | None:
    """The distribution of ours that offers `name`, if one does."""
    return next((dist for dist, names in PROVIDERS.get(kind, {}).items() if name in names), None)
