"""`args`: the settings of the run under the names that flags have in slime and Miles."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.api import ConfigError, Routing
from miles_compat.current import current
from miles_compat.defaults import DEFAULTS

NAME = "slime_function"
DIMENSIONS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Attribute -> where a transformers config says it."""


class Args(argparse.Namespace):
    """What functions of upstream get first. There is one for a run; what a function sets stays set.

    An attribute is, in this order: what somebody has set; what the options `args` and `config_path` say; what the run
    says; a dimension of the model; upstream's default. Anything else is an AttributeError that says where to set it, so
    that `getattr(args, "x", None)` does what it does upstream.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in DEFAULTS:
            return DEFAULTS[name]
        found = _of_the_model(name)
        if found is None:
            raise AttributeError(
                f"args.{name}: no setting of this run is called so, nor a flag of slime or Miles that is known. "
                f"Give it to generate as an option, {{name: {NAME}, args: {{{name}: ...}}}}, or in the YAML file of "
                "--custom-config-path"
            )
        setattr(self, name, found)
        return found


def args() -> Args:
    """The one of this run."""
    if "args" not in current.facts:
        current.facts["args"] = Args(**_values(current.configured()))
    return current.facts["args"]


def specs(config: Any, kind: str) -> Iterator[Mapping[str, Any]]:
    """Options of each `slime_function` that a configuration names as `generate`, `reward` or `filters`."""
    sets = [*config.data.sets, *config.eval.sets]
    named = config.rollout.filters if kind == "filters" else [s for each in sets for s in _listed(getattr(each, kind))]
    return (spec.options for spec in named if spec.name.rpartition("/")[2] == NAME)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else [value]


def _of_the_model(name: str) -> Any:
    """A dimension; None for what is none."""
    from miles_compat.model import hf_config

    if name in DIMENSIONS:
        return getattr(hf_config().get_text_config(), DIMENSIONS[name], None)
    if name in ("moe_router_topk", "num_experts"):
        routing = Routing.of(hf_config())
        return routing and (routing.top_k if name == "moe_router_topk" else routing.experts)
    return None


# ---------------------------------------------------------------------------------------------------- from the settings


def _values(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for section in type(config).model_fields:
        values |= dict(_section(getattr(config, section)))
    for task_set in (*config.eval.sets[:1], *config.data.sets[:1]):
        values |= dict(_section(task_set))
    for task_set in config.eval.sets[:1]:
        values |= _evaluation(task_set)
    data, rollout = config.data.sets[:1], config.rollout
    values["n_samples_per_prompt"] = (data and data[0].n_samples_per_prompt) or rollout.n_samples_per_prompt
    values["prompt_data"] = data[0].path if data else None
    return values | _functions(config) | _further(config)


def _section(section: Any) -> Iterator[tuple[str, Any]]:
    """Attribute and value of every leaf, sections within sections included."""
    for field, about in type(section).model_fields.items() if hasattr(type(section), "model_fields") else ():
        value = getattr(section, field)
        if hasattr(type(value), "model_fields") and not hasattr(value, "options"):
            yield from _section(value)
            continue
        flags = next((item.names for item in about.metadata if hasattr(item, "names")), (f"--{field}",))
        for flag in flags:
            yield flag.removeprefix("--").replace("-", "_"), _plain(value)


def _plain(value: Any) -> Any:
    """As upstream holds it: names of components, paths as text, lists, and None for what is empty."""
    if hasattr(value, "options"):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        listed = [_plain(item) for item in value]
        return (listed[0] if len(listed) == 1 and hasattr(value[0], "options") else listed) or None
    return value


def _evaluation(task_set: Any) -> dict[str, Any]:
    """Settings of the first evaluation set, under upstream's names."""
    sampling = task_set.sampling
    return {
        "eval_input_key": task_set.keys.input,
        "eval_label_key": task_set.keys.label,
        "eval_tool_key": task_set.keys.tools,
        "n_samples_per_eval_prompt": task_set.n_samples_per_prompt or 1,
        "eval_temperature": sampling.temperature,
        "eval_top_p": sampling.top_p,
        "eval_top_k": sampling.top_k,
        "eval_max_response_len": sampling.max_new_tokens,
        "eval_min_new_tokens": sampling.min_new_tokens,
    }


def _functions(config: Any) -> dict[str, Any]:
    """Paths of functions, and what is said beside them. The first set that says it counts."""
    values: dict[str, Any] = {}
    for spec in specs(config, "filters"):
        values.setdefault("dynamic_sampling_filter_path", spec.get("path"))
    for spec in specs(config, "reward"):
        values.setdefault("custom_rm_path", spec.get("path") or None)
        values.setdefault("reward_key", spec.get("reward_key") or None)
        values.setdefault("group_rm", spec.get("group_rm", False))
    for spec in specs(config, "generate"):
        values.setdefault("custom_generate_function_path", spec.get("path") or None)
    return values


def _further(config: Any) -> dict[str, Any]:
    """What the options `config_path` and `args` add."""
    values: dict[str, Any] = {}
    for spec in specs(config, "generate"):
        values |= {**_file(spec.get("config_path") or ""), **(spec.get("args") or {})}
    return values


def _file(path: str) -> Mapping[str, Any]:
    import yaml

    if not path:
        return {}
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--custom-config-path {path}: {error}") from error
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise ConfigError(f"--custom-config-path {path}: a mapping from names to values is expected")
    return read
