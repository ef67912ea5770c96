"""Every leaf of the schema: its path, type, default, help text, kind of component and command-line flags."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from miles.config.base import Flag, RewardSpec, Section, Spec, as_spec, as_spec_list, as_weighted
from miles.config.data import TaskSet
from miles.config.schema import Config
from miles.kinds import KINDS

Path = tuple[str, ...]
Shape = Literal["value", "spec", "specs", "rewards"]
SETS: frozenset[Path] = frozenset({("data", "sets"), ("eval", "sets")})
"""Where task sets are; below each, `*` stands for the name of a set."""
FLAT = "(flat)"
"""In the path of a flat flag, in place of the name of a set: the set called `default`, or the only one; in evaluation,
every set."""

EVAL_FLAGS: dict[str, str] = {
    "--eval-input-key": "keys.input",
    "--eval-label-key": "keys.label",
    "--eval-tool-key": "keys.tools",
    "--n-samples-per-eval-prompt": "n_samples_per_prompt",
    "--eval-temperature": "sampling.temperature",
    "--eval-top-p": "sampling.top_p",
    "--eval-top-k": "sampling.top_k",
    "--eval-min-p": "sampling.min_p",
    "--eval-max-response-len": "sampling.max_new_tokens",
    "--eval-min-new-tokens": "sampling.min_new_tokens",
    "--eval-reward": "reward",
}
"""Flags that fill every set of `eval.sets`."""


@dataclass(frozen=True)
class Leaf:
    """One setting."""

    path: Path
    annotation: Any
    default: Any
    help: str
    flags: tuple[str, ...]
    """Canonical flag first; empty below `eval.sets` and for the name of a set."""
    shape: Shape
    kind: str | None
    """Kind of component that it names."""

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def flat(self) -> Path:
        """The path that a flat flag sets."""
        return tuple(FLAT if part == "*" else part for part in self.path)

    def items(self, value: Any) -> list[Any] | None:
        """The components of a value in any of its short forms; None where it is no list of components."""
        if self.shape == "spec":
            return [] if value is None else [as_spec(value)]
        listed = as_weighted(value) if self.shape == "rewards" else as_spec_list(value)
        if not isinstance(listed, list | tuple):
            return None
        return [as_spec(item, RewardSpec if self.shape == "rewards" else Spec) for item in listed]

    @property
    def is_bool(self) -> bool:
        return bool in _members(self.annotation)

    @property
    def is_list(self) -> bool:
        return self.shape in ("specs", "rewards") or any(
            typing.get_origin(m) in (tuple, dict) for m in _members(self.annotation)
        )


@cache
def leaves() -> dict[Path, Leaf]:
    """Path -> leaf, in the order of the schema."""
    return {leaf.path: leaf for leaf in _walk(Config, ())}


@cache
def flag_table() -> dict[str, Leaf]:
    """Flag -> leaf, aliases and the flags of evaluation included.

    Raises:
        ValueError: two leaves claim one flag, which is a mistake in the schema.
    """
    table: dict[str, Leaf] = {}
    for leaf in leaves().values():
        for flag in leaf.flags:
            if flag in table:
                raise ValueError(f"{flag} is claimed by {table[flag].dotted} and {leaf.dotted}")
            table[flag] = leaf
    for flag, below in EVAL_FLAGS.items():
        table[flag] = leaves()["eval", "sets", "*", *below.split(".")]
    return table


def pattern(path: Path) -> Path:
    """A path with the names of task sets replaced by `*`."""
    return (*path[:2], "*", *path[3:]) if len(path) > 2 and path[:2] in SETS else path


def leaf_above(path: Path) -> tuple[Leaf, Path] | None:
    """The leaf that a path is, or is below, and what remains of the path under it."""
    for end in range(len(path), 0, -1):
        leaf = leaves().get(pattern(path[:end]))
        if leaf is not None:
            return leaf, path[end:]
    return None


def leaf_path(path: Path) -> Path:
    """The leaf's part of the path of something in it; all of a path that is of no leaf."""
    found = leaf_above(path)
    return path[: len(path) - len(found[1])] if found else path


def children(path: Path) -> list[str]:
    """Names that may follow a section's path."""
    here = pattern(path)
    return list(dict.fromkeys(leaf.path[len(here)] for leaf in leaves().values() if leaf.path[: len(here)] == here))


def _walk(model: type[BaseModel], at: Path) -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        path = (*at, name)
        inner = _members(field.annotation)[0]
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _walk(inner, path)
        elif path in SETS:
            yield from _walk(TaskSet, (*path, "*"))
        else:
            yield _leaf(path, field)


def _leaf(path: Path, field: FieldInfo) -> Leaf:
    flag = next((item for item in field.metadata if isinstance(item, Flag)), None)
    names = flag.names if flag else (f"--{path[-1].replace('_', '-')}",)
    if path[0] == "eval" and "*" in path:
        names = ()
    dotted = ".".join(path)
    kind = next((kind.name for kind in KINDS.values() if dotted in kind.keys and kind.protocol is not None), None)
    return Leaf(path, field.annotation, field.default, field.description or "", names, _shape(field.annotation), kind)


def _shape(annotation: Any) -> Shape:
    member = _members(annotation)[0]
    if member is Spec:
        return "spec"
    if typing.get_origin(member) is tuple:
        item = _strip(typing.get_args(member)[0])
        return "specs" if item is Spec else "rewards" if item is RewardSpec else "value"
    return "value"


def _strip(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> list[Any]:
    """What an optional or a union may be, None left out."""
    annotation = _strip(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [_strip(m) for m in typing.get_args(annotation) if m is not type(None)]
    return [annotation]
