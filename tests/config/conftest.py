"""A process with a few light components, and `resolve` on it."""

import types
from dataclasses import dataclass

import pytest

from miles.api import Component, hookimpl
from miles.config.load import resolve
from miles.plugins import load_plugins
from miles.registry import Registry

MODEL = ("--hf-checkpoint", "org/tiny", "--num-rollout", "3", "--prompt-data", "train.jsonl", "--rm-type", "one")


@dataclass(frozen=True)
class LossOptions:
    low: float = 0.2
    high: float | None = None
    on: bool = False
    perhaps: bool | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class BoundedOptions:
    most: float
    least: float


class Extra(types.SimpleNamespace):
    """A plugin given as an object."""

    __name__ = "extra"

    @hookimpl
    def miles_register_policy_losses(self):
        flags = {"--loss-low": "low", "--loss-on": "on", "--loss-perhaps": "perhaps", "--loss-sizes": "sizes"}
        return {
            "soft": Component("parts:soft", options=LossOptions, flags=flags),
            "hard": Component("parts:hard", options=LossOptions),
            "unjudging": Component("parts:unjudging", provides=("without rewards",)),
            "picking": Component("parts:picking", needs={"logits", "teacher_top_k"}),
            "copying": Component("parts:copying", needs={"logits", "teacher_logits"}),
        }

    @hookimpl
    def miles_register_advantage_estimators(self):
        return {
            "flat": Component("parts:flat"),
            "steep": Component("parts:steep", options=LossOptions),
            "valued": Component("parts:valued", needs={"critic"}),
            "taught": Component("parts:taught", needs={"teacher", "entropy"}),
            "greedy": Component("parts:greedy", needs={"greedy_rollout"}),
            "compared": Component("parts:compared", needs={"rollout_log_probs"}),
            "unpaid": Component("parts:unpaid", provides=("without rewards",)),
            "pull": Component("parts:pull", flags={"--use-pull": ""}, provides=("algorithm.advantage_terms",)),
        }

    @hookimpl
    def miles_register_is_corrections(self):
        flags = {"--use-weighting": "", "--weighting-low": "low"}
        return {
            "weighting": Component("parts:weighting", options=LossOptions, flags=flags),
            "rejecting": Component("parts:rejecting", flags={"--use-rejecting": ""}),
            "bounded": Component("parts:bounded", options=BoundedOptions, flags={"--bounded-most": "most"}),
        }

    @hookimpl
    def miles_register_routing_replays(self):
        return {"replay": Component("parts:replay", needs={"routed_experts"})}

    @hookimpl
    def miles_register_rewards(self):
        return {
            "one": Component("parts:one"),
            "two": Component("parts:two", options=LossOptions),
            "world": Component("parts:world", needs={"environment"}),
            "scaled": Component(
                "parts:scaled",
                options=LossOptions,
                flags={"--scale-low": "low", "--scale-on": "on"},
                provides=("--scale-low",),
            ),
        }

    @hookimpl
    def miles_register_sample_filters(self):
        return {
            "sieve": Component("parts:sieve", options=LossOptions, flags={"--use-sieve": ""}),
            "by_experts": Component("parts:by_experts", needs={"routed_experts"}),
        }

    @hookimpl
    def miles_register_generate_functions(self):
        flags = {"--chatty-low": "low"}
        return {"chatty": Component("parts:chatty", options=LossOptions, flags=flags, provides=("--chatty-low",))}

    @hookimpl
    def miles_register_environments(self):
        return {"maze": Component("parts:Maze", options=LossOptions)}

    @hookimpl
    def miles_register_presets(self):
        return {
            "recipe": {
                "algorithm": {
                    "advantage_estimator": "steep",
                    "policy_loss": {"name": "soft", "low": 0.1, "high": 0.3},
                    "kl_loss_coef": 0.05,
                },
                "rollout": {"batch_size": 7},
            },
            "typo": {"algorithm": {"kl_los_coef": 1}},
        }


@pytest.fixture(scope="session")
def plugins():
    return load_plugins(extra=[Extra()])


@pytest.fixture
def solve(plugins):
    """`solve(files, "--flag", "value", ..., overrides=...)`, with model, data and steps given already."""

    def solve(files=(), *arguments, overrides=None, purpose="train", base=MODEL):
        registry = Registry(plugins)
        return resolve(files, [*base, *arguments], plugins, overrides, registry=registry, purpose=purpose)

    return solve
