"""The command line. Importing this imports no torch and no plugin: each command imports what it needs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from miles import __version__
from miles.errors import MilesError

COMMANDS = {
    "train": ("miles.cli.train", "train a model: [CONFIG.yaml ...] [--flag value] [--section.key=value] [--dry-run]"),
    "rollout": (
        "miles.cli.rollout",
        "generate and judge a run's batches without training: the same, and --dump FOLDER",
    ),
    "eval": ("miles.cli.evaluate", "evaluate a checkpoint: the same arguments, and --checkpoint PATH"),
    "report": ("miles.cli.report", "write one HTML file with curves and samples: RUN [RUN2 ...] [--out FILE]"),
    "compare": (
        "miles.cli.compare",
        "say where two runs part: the first token, metrics, weights: RUN RUN2 [--tolerance X]",
    ),
    "config": ("miles.cli.config", "print the resolved configuration, each value with its origin [--json]"),
    "bench": ("miles.cli.bench", "measure how fast it is here [NAME ...] [--json FILE] [--baseline FILE] [--list]"),
    "env": ("miles.cli.env", "play an environment without a model, and check it: check NAME [--option KEY=VALUE]"),
    "plugins": ("miles.cli.plugins", "list plugins and components [--json] [--kind KIND]; `doctor` lists every fault"),
    "doctor": ("miles.cli.doctor", "what is installed here, what is missing, and for what [--json] [--online]"),
    "new-plugin": ("miles.cli.new_plugin", "write the package of a new plugin: KIND NAME [--dir DIR]"),
}
"""Command -> module with `run(call: Call) -> int`, and one line of help. Plugins bring more: `miles.cli.brought`."""


SPINS = "2000"
"""How long torch's OpenMP threads look for work before they sleep: some 20 microseconds, longer than the pause between
two small operations, and short enough to leave the core to other programs. Read when torch is loaded."""


@dataclass
class Call:
    """A command line, with what every command understands taken out."""

    command: str = ""
    words: list[str] = field(default_factory=list)
    """What comes after the command."""
    blocked: list[str] = field(default_factory=list)
    """Plugins left out with `-p no:NAME`."""
    debug: bool = False
    help: bool = False

    def take(self, flag: str) -> bool:
        """Whether a flag without a value is there; it is then removed."""
        if flag not in self.words:
            return False
        self.words.remove(flag)
        return True

    def take_value(self, flag: str) -> str | None:
        """The value of `--flag value` or `--flag=value`, removed; None when it is not there."""
        for index, word in enumerate(self.words):
            if word == flag and index + 1 < len(self.words):
                value = self.words[index + 1]
                del self.words[index : index + 2]
                return value
            if word.startswith(f"{flag}="):
                del self.words[index]
                return word.partition("=")[2]
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of miles are one message; `--debug` adds the traceback."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    call = read_call(sys.argv[1:] if argv is None else argv)
    if isinstance(call, int):
        return call
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `my_module:my_function` is found where the person stands
    try:
        return module_of(call.command).run(call)
    except MilesError as error:
        if call.debug:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"miles: {error}{notes}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("miles: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def module_of(command: str) -> Any:
    """Raises PluginError where the plugin that brings a command is not installed, or broken."""
    if command in COMMANDS:
        return importlib.import_module(COMMANDS[command][0])
    from miles.cli.brought import load

    return load(command)


def every_command() -> dict[str, str]:
    """Command -> one line of help: ours, and those that plugins bring."""
    from miles.cli.brought import brought

    ours = {name: text for name, (_, text) in COMMANDS.items()}
    return ours | brought() | ours


def read_call(argv: Sequence[str]) -> Call | int:
    """Take the common options out; an exit code when there is nothing more to do."""
    call, words = Call(), list(argv)
    while words:
        word = words.pop(0)
        if word == "--debug":
            call.debug = True
        elif word in ("-h", "--help"):
            call.help = True
        elif word == "--version" and not call.command:
            print(f"miles {__version__}")
            return 0
        elif word == "-p" or word.startswith("-pno:"):
            name = word[2:] if word != "-p" else words.pop(0) if words else ""
            if not name.startswith("no:") or name == "no:":
                print("miles: -p takes no:NAME, where NAME is a plugin or a distribution", file=sys.stderr)
                return 2
            call.blocked.append(name.removeprefix("no:"))
        elif call.command or word.startswith("-"):
            call.words.append(word)
        else:
            call.command = word
    return _checked(call)


def _checked(call: Call) -> Call | int:
    if call.command in COMMANDS:
        return call
    if call.command:
        from difflib import get_close_matches

        known = every_command()
        if call.command in known:
            return call
        close = get_close_matches(call.command, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(known)}"
        print(f"miles: unknown command {call.command!r}; {hint}", file=sys.stderr)
        return 2
    if call.words:
        print(f"miles: {call.words[0]} comes after a command, such as `miles train`", file=sys.stderr)
        return 2
    print(usage())
    return 0 if call.help else 2


def usage() -> str:
    """What `miles --help` prints."""
    lines = [f"miles {__version__}: reinforcement learning for language models, one plugin at a time", ""]
    lines += ["usage: miles COMMAND ...", ""]
    lines += [f"  {name:<10} {text}" for name, text in every_command().items()]
    lines += ["", "with every command:"]
    lines += ["  --help       what the command takes; `miles train --help` lists every flag with its default"]
    lines += ["  -p no:NAME   leave out a plugin", "  --debug      show tracebacks of errors", "  --version"]
    return "\n".join(lines)
