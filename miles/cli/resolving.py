"""What the commands that take a configuration have in common."""

from __future__ import annotations

from collections.abc import Sequence

from miles.cli import Call
from miles.cli.files import missing_files
from miles.config.faults import ConfigFaults
from miles.config.load import Purpose, Resolved, plugin_wishes, resolve
from miles.plugins import Plugins, load_plugins


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, flags): files come first."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:count]), list(words[count:])


def resolve_call(call: Call, purpose: Purpose, extra: Sequence[str] = ()) -> tuple[Resolved, Plugins]:
    """Load plugins as the configuration wishes, and resolve it; `extra` are further flags.

    Raises:
        ConfigError, PluginError: everything that is wrong, before anything is built.
    """
    files, arguments = split(call.words)
    block, require = plugin_wishes(files, arguments)
    block = list(dict.fromkeys([*block, *call.blocked]))
    plugins = load_plugins(block=block, require=require)
    if call.blocked:  # workers load plugins by the configuration alone
        arguments += ["--plugins-block", *block]
    resolved = resolve(files, [*arguments, *extra], plugins, purpose=purpose)
    if purpose != "show":
        faults = missing_files(resolved)
        if faults:
            raise ConfigFaults(faults)
    return resolved, plugins
