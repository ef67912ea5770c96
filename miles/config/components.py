"""The components that a configuration names, wherever it names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles.component import Need
from miles.config.base import NONE
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
    """Everything that the chosen estimator, terms, correction, loss and masks need of the core; a KL penalty needs the
    reference."""
    needs = needs_of(config, registry, "algorithm")
    if config.algorithm.kl_coef > 0 or config.algorithm.kl_loss_coef > 0:
        needs.add("reference")
    return needs


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
    start, rest, holders = leaf.path[:2], leaf.path, [(leaf.path, nested)]
    if start in SETS:
        rest, sets = leaf.path[3:], nested.get(start[0], {}).get(start[1], ())
        holders = [((*start, item["name"], *rest), item) for item in sets]
    for path, holder in holders:
        for part in rest[:-1]:
            holder = holder.setdefault(part, {})
        yield path, holder


def _uses(leaf: Leaf, path: Path, holder: dict[str, Any]) -> Iterator[tuple[Use, dict[str, Any]]]:
    found = leaf.items(holder.get(path[-1], leaf.default))
    if found is None:
        return  # the schema says so
    items, single = [_plain(item) for item in found], leaf.shape == "spec"
    if path[-1] in holder:
        holder[path[-1]] = items if not single else items[0] if items else None
    for index, item in enumerate(items):
        if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item["options"], dict):
            place = path if single else (*path, str(index))
            yield Use(str(leaf.kind), place, item["name"], item["options"]), item["options"]


def _plain(item: Any) -> Any:
    """A copy, whose options may be edited."""
    item = item.model_dump() if hasattr(item, "model_dump") else item
    if not isinstance(item, dict):
        return item
    options = item.get("options") or {}
    return {**item, "options": dict(options) if isinstance(options, dict) else options}
