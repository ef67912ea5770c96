"""Finding the answer in a response."""

from __future__ import annotations

import re

from miles.api import DataError, Sample

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")


def labels_of(sample: Sample) -> list[str]:
    """The accepted answers; a label that is a list accepts any of its items.

    Raises:
        DataError: the prompt has no label.
    """
    label = sample.prompt.label
    labels = label if isinstance(label, list | tuple) else [label]
    if not labels or any(item is None for item in labels):
        raise DataError(f"prompt {sample.prompt.id} has no label to compare with; name its column with --label-key")
    return [str(item) for item in labels]


def without_reasoning(text: str) -> str:
    """What was said after the last `</think>`."""
    return text.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` whose braces are balanced."""
    for match in reversed(list(_BOXED.finditer(text))):
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() + 1 : end]
    return None


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    lines = text.split("\n")
    return next((line for line in reversed(lines) if line.strip()), None)


def last_number(text: str) -> str | None:
    """The last number, without thousands separators."""
    numbers = [number for number in _NUMBER.findall(text) if number]
    return numbers[-1].replace(",", "") if numbers else None


def _closing_brace(text: str, start: int) -> int | None:
    """Where the group that opens at `start` closes; braces after a backslash do not count."""
    depth, escaped = 0, False
    for i in range(start, len(text)):
        if escaped:
            escaped = False
            continue
        escaped = text[i] == "\\"
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None
