"""What the commands that take a configuration have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

from miles.cli import Call
from miles.config.arguments import UNKNOWN_FLAG
from miles.config.faults import ConfigFaults, Fault
from miles.config.load import Purpose, Resolved, plugin_wishes, resolve
from miles.diagnosis.preflight import preflight, require_ready
from miles.plugins import Plugins, load_plugins


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, flags): files come first."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:count]), list(words[count:])


def resolve_call(
    call: Call, purpose: Purpose, extra: Sequence[str] = (), own: Sequence[str] = ()
) -> tuple[Resolved, Plugins]:
    """Load plugins as the configuration wishes, and resolve it.

    Args:
        extra: further flags.
        own: flags of the command itself, for what to say of unknown ones.

    Raises:
        ConfigError, PluginError: everything that is wrong, before anything is built.
    """
    files, arguments = split(call.words)
    block, require = plugin_wishes(files, arguments)
    block = list(dict.fromkeys([*block, *call.blocked]))
    plugins = load_plugins(block=block, require=require)
    if call.blocked:  # workers load plugins by the configuration alone
        arguments += ["--plugins-block", *block]
    try:
        resolved = resolve(files, [*arguments, *extra], plugins, purpose=purpose)
    except ConfigFaults as error:
        more = preflight(error.resolved, purpose) if error.resolved and purpose != "show" else []
        raise ConfigFaults([*(_of_command(fault, call.command, own) for fault in error.faults), *more]) from error
    if purpose != "show":
        require_ready(resolved, purpose)
    return resolved, plugins


def _of_command(fault: Fault, command: str, own: Sequence[str]) -> Fault:
    """A fault with the command's own flags in mind: `--changd` was to be `--changed`."""
    if fault.problem != UNKNOWN_FLAG:
        return fault
    help_text = f"see `miles {command} --help`"
    close = get_close_matches(fault.key, own, n=1, cutoff=0.7)
    if close:
        return replace(fault, remedy=f"did you mean {close[0]}? {help_text}")
    return replace(fault, remedy=fault.remedy.replace("see `miles train --help`", help_text))


def listed(title: str, metrics: Mapping[str, float]) -> str:
    """Metrics below a title, a line each."""
    width = max(map(len, metrics), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value:.6g}" for name, value in metrics.items())])
