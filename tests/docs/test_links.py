"""Every relative link and anchor leads somewhere; every command and flag that a page shows exists."""

import re
from pathlib import Path

import pytest

from miles.cli import every_command, module_of
from miles.config.arguments import EVAL_PROMPT_DATA, engine_of
from miles.config.leaves import SETS, flag_table, leaf_above
from miles.config.selection import component_flags
from miles.plugins import load_plugins
from miles.registry import Registry

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "examples/*/*.md", "plugins/*/*/README.md") for path in ROOT.glob(pattern)
)
COMMON = {"--help", "--version", "--debug", "--json"}
CONFIGURED = {"train", "rollout", "eval", "config"}
"""Commands that take the flags of a configuration; the others' are in their help text."""
OWN = {"train": {"--dry-run"}, "rollout": set(), "eval": {"--checkpoint"}, "config": {"--changed"}}
PLACEHOLDER = re.compile(r"^--(flag|x|no-x|NAME.*|section\..*|.*\.\.\.)$")
REGISTRY = Registry(load_plugins(strict=False))


def named(path):
    return str(path.relative_to(ROOT))


def prose(text):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text):
    """What GitHub makes of headings."""
    found = []
    for title in re.findall(r"^#+ (.+)$", prose(text), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found + re.findall(r'<a (?:id|name)="([^"]+)"', text)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    without_code = re.sub(r"`[^`\n]*`", "", prose(text))
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def commands(text):
    """`miles ...` lines of fenced and indented blocks, continued lines joined, comments and pipes cut off."""
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```$", text, re.M | re.S)
    blocks += re.findall(r"^((?: {4,}\S.*\n)+)", prose(text), re.M)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            line = re.split(r"\s#\s|\s{3,}|[|;&>)]", line.strip().removeprefix("$ "))[0]
            if re.match(r"miles [a-z-]+( |$)", line):
                yield line.split()


def flags_of(words):
    return [word.partition("=")[0] for word in words if re.match(r"--[a-zA-Z]", word)]


def is_flag(command, flag):
    if flag in COMMON or flag in OWN.get(command, ()) or PLACEHOLDER.match(flag):
        return True
    if command not in CONFIGURED:
        return flag in module_of(command).HELP
    table = {**flag_table(), **component_flags(REGISTRY), EVAL_PROMPT_DATA: None}
    if flag in table or flag.replace("--no-", "--", 1) in table:
        return True
    if "." in flag:
        at = tuple(part.replace("-", "_") for part in flag[2:].split("."))
        return at in SETS or leaf_above(at) is not None
    return engine_of(flag, REGISTRY) is not None


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_and_their_flags_exist(path):
    text = path.read_text(encoding="utf-8")
    for words in commands(text):
        command = words[1]
        assert command in every_command(), " ".join(words)
        declared = re.findall(r'"(--[\w-]+)": "', text)  # by a plugin that the page writes
        wrong = [flag for flag in flags_of(words[2:]) if not is_flag(command, flag) and flag not in declared]
        assert wrong == [], " ".join(words)


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", "docs/concepts.md", "README.md"])
def test_flags_in_the_text_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", text))
    every = {c for c in every_command() if c not in CONFIGURED}
    elsewhere = {"--local-dir"}  # of other programs
    wrong = [
        flag
        for flag in sorted(found - elsewhere)
        if not any(is_flag(command, flag) for command in (*CONFIGURED, *every))
    ]
    assert wrong == []


def test_something_is_checked():
    every = [words for path in PAGES for words in commands(path.read_text(encoding="utf-8"))]
    assert len(PAGES) > 12
    assert len(every) > 30
    assert {"train", "rollout", "eval", "config", "plugins"} <= {words[1] for words in every}
    assert not is_flag("train", "--learning-rate-of-mine")
    assert "the-arithmetic-of-batches" in anchors((ROOT / "docs/concepts.md").read_text())
