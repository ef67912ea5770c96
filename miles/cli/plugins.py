"""`miles plugins` and `miles plugins doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from miles.cli import Call
from miles.cli.kinds import NAMES, kind_called
from miles.component import Component
from miles.diagnosis.components import diagnose
from miles.errors import ConfigError
from miles.kinds import KINDS
from miles.log import counted
from miles.plugins import PluginInfo, Plugins, Registration, load_plugins
from miles.registry import Registry

HELP = f"""usage: miles plugins [--json] [--kind KIND]     what is installed, and what it offers
       miles plugins doctor                     load and check everything; list every fault; exit 2 if there is one

kinds: {NAMES}"""


def run(call: Call) -> int:
    """List, or examine."""
    if call.help:
        print(HELP)
        return 0
    as_json, word = call.take("--json"), call.take_value("--kind")
    kind = None if word is None else kind_called(word).name
    plugins = load_plugins(block=call.blocked, strict=False)
    if call.words == ["doctor"]:
        return _doctor(plugins)
    if call.words:
        close = get_close_matches(call.words[0], ("doctor", "--json", "--kind"), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"miles plugins does not take {call.words[0]!r}; {hint}see `miles plugins --help`")
    registry = Registry(plugins)
    offers = [offer for name in KINDS if kind in (None, name) for offer in registry.offers(name)]
    print(_as_json(plugins, offers) if as_json else _as_text({} if kind else plugins.infos, offers))
    for fault in plugins.faults:
        print(f"miles: {fault}", file=sys.stderr)
    return 2 if plugins.faults else 0


def _doctor(plugins: Plugins) -> int:
    report = diagnose(plugins)
    for info in plugins.infos.values():
        print(f"{info.name}: {info.distribution} {info.version}, API {info.api or 'not stated'}")
    for name in plugins.blocked:
        print(f"{name}: left out")
    for fault in report:
        print(f"FAULT {fault}")
    faults, every = len(report), len(plugins.infos) + len(plugins.faults)
    print(f"{counted(faults, 'fault')} in {counted(every, 'plugin')}" if report else "all is well")
    return 2 if report else 0


def _as_json(plugins: Plugins, offers: Sequence[Registration]) -> str:
    components = [
        {
            "kind": offer.kind,
            "name": offer.name,
            "plugin": offer.plugin.name,
            "distribution": offer.plugin.distribution,
            "summary": getattr(offer.value, "summary", ""),
            "paper": getattr(offer.value, "paper", ""),
            "target": getattr(offer.value, "target", None),
        }
        for offer in offers
    ]
    return json.dumps({"plugins": plugins.provenance(), "components": components}, indent=2)


def _as_text(infos: Mapping[str, PluginInfo], offers: Sequence[Registration]) -> str:
    lines = [f"{info.name:<24} {info.distribution} {info.version}" for info in infos.values()]
    wide = max([len(offer.plugin.distribution) for offer in offers], default=0)
    for kind, those in groupby(offers, lambda offer: offer.kind):
        lines += [*([""] if lines else []), f"{kind} ({', '.join(KINDS[kind].keys)}):"]
        lines += [f"  {offer.name:<28} {offer.plugin.distribution:<{wide}}  {_about(offer)}" for offer in those]
    return "\n".join(lines)


def _about(offer: Registration) -> str:
    """What a component is, or the settings of a preset."""
    if isinstance(offer.value, Component):
        return offer.value.summary + (f" [{offer.value.paper}]" if offer.value.paper else "")
    settings = [(f"{section}.{key}", value) for section, keys in offer.value.items() for key, value in keys.items()]
    return ", ".join(f"{path}={_short(value)}" for path, value in settings)


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        options = ", ".join(f"{key}={_short(option)}" for key, option in value.items() if key != "name")
        return f"{value['name']}({options})" if options else str(value["name"])
    return value if isinstance(value, str) else json.dumps(value)
