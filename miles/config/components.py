"""The components that a configuration names, wherever it names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles.component import Need
from miles.config.base import NONE, as_reward, as_spec, as_spec_list, as_weighted
from miles.config.leaves import SETS, Leaf, Path, leaves
from miles.config.schema import Config
from miles.config.values import Text, from_text, item_type
from miles.errors import MilesError
from miles.kinds import KINDS
from miles.options import options_of
from miles.registry import Registry

WITHOUT_REWARDS = "without rewards"
"""What an estimator, a term or a loss provides that looks at no reward."""


@dataclass(frozen=True)
class Use:
    """One place where a configuration names a component."""

    kind: str
    path: Path
    """Of the spec; task sets by name, items of a list by index."""
    name: str
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        return ".".join(self.path)


def components_of(config: Config) -> list[Use]:
    """Every component that a configuration names, in the order of the schema; None where nothing is named."""
    return [use for use, _ in uses_in(config.model_dump())]


def uses_in(nested: dict[str, Any]) -> Iterator[tuple[Use, dict[str, Any]]]:
    """The same for a nested mapping that may not be valid yet; with each, the mapping of its options, to be edited."""
    for leaf in leaves().values():
        if leaf.kind is not None:
            for path, holder in _holders(nested, leaf):
                yield from _uses(leaf, path, holder)


def needs_of(config: Config, registry: Registry, section: str = "") -> set[Need]:
    """What the components that a configuration names, or one section of it, need of the core."""
    uses = [use for use in components_of(config) if use.key.startswith(section)]
    named = [(use.kind, use.name) for use in uses if use.name not in KINDS[use.kind].words]
    return {need for kind, name in named for need in registry.component(kind, name).needs}


def component_needs(config: Config, registry: Registry) -> set[Need]:
    """Everything that the chosen estimator, terms, correction, loss and masks need of the core."""
    return needs_of(config, registry, "algorithm")


def needs_reference(config: Config, registry: Registry) -> bool:
    """Whether a reference model must be kept: for a KL penalty, or because a component says so."""
    penalised = config.algorithm.kl_coef > 0 or config.algorithm.kl_loss_coef > 0
    return penalised or "reference" in component_needs(config, registry)


def learns_without_rewards(config: Config, registry: Registry) -> bool:
    """Whether whatever says what is learnt looks at no reward: the estimator and its terms, or the loss where there is
    no estimator. False where a name is unknown."""
    algorithm = config.algorithm
    estimators = [("advantage_estimators", s.name) for s in (algorithm.advantage_estimator, *algorithm.advantage_terms)]
    chosen = estimators if estimators[0][1] != NONE else [("policy_losses", algorithm.policy_loss.name)]
    try:
        return all(WITHOUT_REWARDS in registry.component(kind, name).provides for kind, name in chosen)
    except MilesError:
        return False


def read_texts(options: dict[str, Any], kind: type | None) -> None:
    """Options from a command line become values, now that their component, and so their types, are known."""
    known = options_of(kind)
    for key, value in options.items():
        annotation = known[key].annotation if key in known else Any
        if isinstance(value, Text):
            options[key] = from_text(value, annotation)
        elif isinstance(value, list):
            item = item_type(annotation)
            options[key] = [from_text(text, item) if isinstance(text, Text) else text for text in value]
        elif isinstance(value, dict):
            options[key] = dict(value)
            read_texts(options[key], None)


def _holders(nested: dict[str, Any], leaf: Leaf) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Mappings that hold (or could hold) this leaf: one, or one for each task set."""
    path = leaf.path
    if path[:2] not in SETS:
        holder = nested
        for part in path[:-1]:
            holder = holder.setdefault(part, {})
        yield path, holder
        return
    for item in nested.get(path[0], {}).get(path[1], ()):
        holder = item
        for part in path[3:-1]:
            holder = holder.setdefault(part, {})
        yield (*path[:2], item["name"], *path[3:]), holder


def _uses(leaf: Leaf, path: Path, holder: dict[str, Any]) -> Iterator[tuple[Use, dict[str, Any]]]:
    value = holder.get(path[-1], leaf.default)
    if leaf.shape == "spec":
        items = [] if value is None else [_plain(as_spec(value))]
        places = [path]
    else:
        normal = as_weighted(value) if leaf.shape == "rewards" else as_spec_list(value)
        if not isinstance(normal, list | tuple):
            return  # not a list of components: the schema says so
        items = [_plain(as_reward(item) if leaf.shape == "rewards" else as_spec(item)) for item in normal]
        places = [(*path, str(index)) for index in range(len(items))]
    if path[-1] in holder:
        holder[path[-1]] = (items[0] if items else None) if leaf.shape == "spec" else items
    for place, item in zip(places, items, strict=False):
        if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("options", {}), dict):
            options = item.setdefault("options", {})
            yield Use(str(leaf.kind), place, item["name"], options), options


def _plain(item: Any) -> Any:
    item = item.model_dump() if hasattr(item, "model_dump") else item
    return {**item, "options": dict(item.get("options") or {})} if isinstance(item, dict) else item
