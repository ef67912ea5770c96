"""From a command line to settings: flat flags, `--section.key=value`, flags of components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from miles.config.base import Spec
from miles.config.faults import Fault, Origin
from miles.config.leaves import SETS, Leaf, flag_table, leaf_above
from miles.config.selection import component_flags
from miles.config.settings import Flattener, Setting
from miles.config.upstream import SWITCHES, answer_to, answers
from miles.config.values import Text, from_text
from miles.registry import Registry

EVAL_PROMPT_DATA = "--eval-prompt-data"
UNKNOWN_FLAG = "unknown flag"


ComponentFlag = tuple[str, Any, Origin]
"""Flag and value, of a flag that components declare or an `--<engine>-<option>`: whose it is depends on which
components are selected."""


@dataclass
class Arguments:
    """What a command line said."""

    settings: list[Setting] = field(default_factory=list)
    component_flags: list[ComponentFlag] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def read_arguments(arguments: Sequence[str], registry: Registry, flattener: Flattener) -> Arguments:
    """Read everything after the config files."""
    return _Reader(arguments, registry, flattener).read()


class _Reader:
    def __init__(self, arguments: Sequence[str], registry: Registry, flattener: Flattener):
        self._left = list(arguments)
        self._registry = registry
        self._flattener = flattener
        self._component_flags = component_flags(registry)
        self._out = Arguments(faults=flattener.faults)

    def read(self) -> Arguments:
        while self._left:
            word = self._left.pop(0)
            if not word.startswith("--") or word == "--":
                self._fault(word, "is no flag", "config files come first, then flags; lists are `--flag a b c`")
                continue
            flag, equals, text = word.partition("=")
            self._one(flag, text if equals else None)
        return self._out

    def _one(self, flag: str, text: str | None) -> None:
        leaf = flag_table().get(flag)
        positive = f"--{flag[5:]}" if flag.startswith("--no-") else ""
        if flag == EVAL_PROMPT_DATA:
            self._eval_prompt_data(self._words(text))
        elif "." in flag:
            self._dotted(flag, text)
        elif leaf is not None:
            self._leaf(flag, leaf, text)
        elif flag[2:] in SWITCHES and text is None:
            named, value = SWITCHES[flag[2:]]
            self._set(flag, flag_table()[named], value, yields=value == flag_table()[named].default)
        elif positive in flag_table() and flag_table()[positive].is_bool:
            self._set(flag, flag_table()[positive], False)
        elif flag in self._component_flags:
            self._component(flag, flag, self._component_value(flag, text))
        elif positive in self._component_flags and self._component_flags[positive].annotation is bool:
            self._component(positive, flag, False)
        elif engine_of(flag, self._registry) and flag[2:] not in answers():
            self._out.component_flags.append((flag, self._free_value(text), Origin("flag", flag)))
        else:
            self._words(text)
            self._unknown(flag)

    # ------------------------------------------------------------------------------------------------- known flags

    def _leaf(self, flag: str, leaf: Leaf, text: str | None) -> None:
        if leaf.is_bool:
            self._set(flag, leaf, from_text(self._optional_bool(text), leaf.annotation))
            return
        words = self._words(text) if leaf.is_list else self._word(text)
        if not words:
            self._out.faults.append(Fault(flag, "needs a value", meaning=leaf.help))
        elif len(words) == 1:
            self._set(flag, leaf, from_text(words[0], leaf.annotation))
        else:
            self._set(flag, leaf, [word if leaf.shape == "value" else from_text(word, Spec) for word in words])

    def _set(self, flag: str, leaf: Leaf, value: Any, yields: bool = False) -> None:
        """`yields`: to whatever else is said of the setting, before or after."""
        at = 0 if yields else len(self._out.settings)
        self._out.settings[at:at] = self._flattener.value(leaf.flat, value, Origin("flag", flag))

    def _dotted(self, flag: str, text: str | None) -> None:
        parts = flag[2:].split(".")
        path = tuple(part.replace("-", "_") for part in parts)
        if path[:2] in SETS and len(path) > 2:
            path = (*path[:2], parts[2], *path[3:])  # the name of a task set is taken as it is
        found = leaf_above(path)
        if text is None and found is not None and not found[1] and found[0].is_bool:
            text = self._optional_bool(None)
        words = [text] if text is not None else self._word(None)
        if not words:
            self._fault(flag, "needs a value", f"{flag}=VALUE")
            return
        value: Any = Text(words[0])
        if found is None:
            value = from_text(value, Any)
        elif not found[1]:
            value = from_text(value, found[0].annotation)
        elif found[1][-1] == "options":
            value = from_text(value, dict[str, Any])
        elif found[0].shape == "value":
            value = from_text(value, Any)
        self._out.settings += self._flattener.value(path, value, Origin("flag", flag))

    def _eval_prompt_data(self, words: list[str]) -> None:
        if not words or len(words) % 2:
            self._fault(EVAL_PROMPT_DATA, f"got {len(words)} words", "give pairs: NAME PATH [NAME PATH ...]")
            return
        origin = Origin("flag", EVAL_PROMPT_DATA)
        for name, path in zip(words[::2], words[1::2], strict=True):
            self._out.settings.append(Setting(("eval", "sets", name), {"inherit": True}, origin))
            self._out.settings.append(Setting(("eval", "sets", name, "path"), path, origin))

    # -------------------------------------------------------------------------------------------- components' flags

    def _component(self, flag: str, written: str, value: Any) -> None:
        declared = self._component_flags[flag]
        self._out.settings += declared.selection(flag, value, Origin("flag", written), self._out.faults)
        if not declared.is_switch:
            self._out.component_flags.append((flag, value, Origin("flag", flag)))

    def _component_value(self, flag: str, text: str | None) -> Any:
        if self._component_flags[flag].annotation is bool:
            return Text(self._optional_bool(text))
        words = self._words(text)
        if not words:
            self._fault(flag, "needs a value")
        return Text(words[0]) if len(words) == 1 else [Text(word) for word in words]

    def _free_value(self, text: str | None) -> Any:
        words = self._words(text)
        return True if not words else Text(words[0]) if len(words) == 1 else [from_text(w, Any) for w in words]

    def _unknown(self, flag: str) -> None:
        answer = answer_to(flag)
        if answer is not None:
            self._fault(flag, answer.problem, answer.remedy)
            return
        known = {*flag_table(), *self._component_flags, EVAL_PROMPT_DATA}
        close = get_close_matches(flag, known, n=2, cutoff=0.7)
        self._fault(flag, UNKNOWN_FLAG, f"did you mean {' or '.join(close)}?" if close else "see `miles train --help`")

    # ------------------------------------------------------------------------------------------------------- words

    def _word(self, text: str | None) -> list[str]:
        if text is not None:
            return [text]
        return [self._left.pop(0)] if self._left and not self._left[0].startswith("--") else []

    def _words(self, text: str | None) -> list[str]:
        if text is not None:
            return [text]
        words = []
        while self._left and not self._left[0].startswith("--"):
            words.append(self._left.pop(0))
        return words

    def _optional_bool(self, text: str | None) -> str:
        if text is None and self._left and self._left[0].lower() in ("true", "false"):
            return self._left.pop(0)
        return "true" if text is None else text

    def _fault(self, key: str, problem: str, remedy: str = "") -> None:
        self._out.faults.append(Fault(key, problem, remedy))


def engine_of(flag: str, registry: Registry) -> tuple[str, str] | None:
    """(engine, option) of a flag `--<engine>-<option>`, for any engine that is installed."""
    for name in sorted(registry.names("rollout_engines"), key=len, reverse=True):
        prefix = f"--{name.replace('_', '-')}-"
        if flag.startswith(prefix) and len(flag) > len(prefix):
            return name, flag[len(prefix) :].replace("-", "_")
    return None
