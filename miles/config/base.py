"""The base of every section, component specs, and how a leaf gets its command-line flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. Unknown keys are errors; a field's docstring is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


@dataclass(frozen=True)
class Flag:
    """Command-line spellings of a leaf. Without one, field `max_prompt_len` gets `--max-prompt-len`.

    The first name is the canonical one; the others are spellings that users of slime and Miles know.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)


NONE, AUTO = "none", "auto"
"""The names that stand for no component, where one is optional, and for the one that follows from all the rest."""


class Spec(BaseModel):
    """Names a component and its options: `grpo`, or `{name: grpo, epsilon: 1e-6}`, or `my_module:my_function`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, Any] = {}

    def __str__(self) -> str:
        return self.name if not self.options else f"{self.name}{self.options}"


class RewardSpec(BaseModel):
    """A reward and its weight in the sum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weight: float = 1.0
    options: dict[str, Any] = {}


def as_spec(value: Any, kind: type[BaseModel] = Spec) -> Any:
    """Accept the short forms in YAML: a name, or a mapping whose other keys are options."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        return value
    own = {key: below for key, below in value.items() if key in kind.model_fields}
    options = own.get("options") or {}
    if not isinstance(options, dict):
        return own  # the schema says what options are
    return {**own, "options": {**options, **{key: below for key, below in value.items() if key not in own}}}


def as_reward(value: Any) -> Any:
    """The same for a reward."""
    return as_spec(value, RewardSpec)


ComponentSpec = Annotated[Spec, BeforeValidator(as_spec)]


def as_spec_list(value: Any) -> Any:
    """Accept a single name or `a,b` where a list of components is meant."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, dict) else value


ComponentSpecs = Annotated[tuple[ComponentSpec, ...], BeforeValidator(as_spec_list)]


def as_weighted(value: Any) -> Any:
    """Accept `name`, `{name: x, option: 1}` or `{exact_match: 1.0, format: 0.1}` for a reward."""
    if isinstance(value, dict) and "name" not in value:
        return [{"name": name, "weight": weight} for name, weight in value.items()]
    return [value] if isinstance(value, str | dict) else value


def _reward_list(value: Any) -> Any:
    listed = as_weighted(value)
    if not isinstance(listed, list | tuple):
        raise ValueError("must be a function, a name, a mapping from names to weights, or a list of functions or names")
    return listed


RewardSpecs = Annotated[tuple[Annotated[RewardSpec, BeforeValidator(as_reward)], ...], BeforeValidator(_reward_list)]
