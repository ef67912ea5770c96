"""What `miles train --help` prints: every flag by section, from the schema and from the installed components."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from miles.cli import Call
from miles.config.leaves import EVAL_FLAGS, Leaf, leaves
from miles.config.selection import SELECTS
from miles.kinds import KINDS
from miles.options import options_of
from miles.plugins import load_plugins
from miles.registry import Registry

HEAD = """usage: miles train [CONFIG.yaml ...] [--flag value] [--section.key=value] [--dry-run]

Config files come first; a later one is put over an earlier one, flags over files. Every setting can be written as its
flag or as its key: `--lr 1e-5` is `--optimizer.lr=1e-5`. `--x` and `--no-x` turn a switch on and off; lists are
`--x a b c` or `--x a,b,c`. A component is a name, `{name: x, option: 1}`, or `my_module:MyThing`.
  --dry-run    check everything and print components, numbers and placement; build nothing
"""


def all_flags(call: Call) -> str:
    """The whole help text."""
    registry = Registry(load_plugins(block=call.blocked, strict=False))
    lines = [HEAD]
    section = ""
    for leaf in leaves().values():
        if not leaf.flags:
            continue
        if leaf.path[0] != section:
            section = leaf.path[0]
            lines += ["", f"{section}:"]
        lines.append(_line(leaf))
    lines += ["", "every set of eval.sets:", "  --eval-prompt-data NAME PATH [NAME PATH ...]"]
    lines += [f"  {flag:<36} eval.sets.*.{below}" for flag, below in EVAL_FLAGS.items()]
    lines += ["", "options of components (given as `--section.key.option=value`, or by flag where there is one):"]
    lines += _component_lines(registry)
    return "\n".join(lines)


def _line(leaf: Leaf) -> str:
    choices = typing.get_args(leaf.annotation) if typing.get_origin(leaf.annotation) is typing.Literal else ()
    names = ", ".join(leaf.flags)
    about = leaf.help.replace("\n", " ")
    choice = f" One of {', '.join(map(str, choices))}." if choices else ""
    return f"  {names:<36} {about}{choice} [{leaf.dotted.replace('*', 'default')} = {_default(leaf.default)}]"


def _component_lines(registry: Registry) -> Iterator[str]:
    for offer in registry.components():
        options = options_of(offer.value.options)
        flags = {option: flag for flag, option in offer.value.flags.items()}
        if not options and not flags:
            continue
        yield f"  {KINDS[offer.kind].singular} {offer.name} ({offer.plugin.distribution}): {offer.value.summary}"
        if SELECTS in flags:
            yield f"    {'selected by':<22} {flags[SELECTS]}"
        for option in options.values():
            yield f"    {option.name:<22} {flags.get(option.name, ''):<20} = {_default(option.default)}"


def _default(value: Any) -> str:
    if value is MISSING:
        return "(must be given)"
    if isinstance(value, tuple):
        return json.dumps([str(item) for item in value])
    return json.dumps(value, default=str) if not isinstance(value, str) else value
