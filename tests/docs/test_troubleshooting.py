"""docs/troubleshooting.md quotes what miles really says, and names metrics that runs really write."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

import miles
from miles.api import Observation, StepResult

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = 26
"""Fewer found on the page means that they are no longer recognised."""
LITERAL = 12
"""Letters that a message must share with a string of the source beyond its variable parts."""


def quoted():
    """Messages in indented blocks: a line that is indented further continues the one before. Commands are left out."""
    found, below = [], None
    for line in PAGE.splitlines():
        indent = len(line) - len(line.lstrip())
        inside = indent >= 4 and not line.lstrip().startswith("- ")
        if not inside:
            below = None
        elif below is not None and indent >= below + 4:
            found[-1] += f" {line.strip()}"
        else:
            below = indent
            found.append(line.strip())
    return [text.removeprefix("miles: ") for text in found if not re.match(r"miles \w", text)]


def strings(tree):
    """Constant parts of every string, None where something is filled in; parts of an f-string are not strings of their
    own."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield [part.value if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield [part for text in re.split(r"%\d*[a-z]", node.value) for part in (text, None)][:-1]


def patterns():
    """Every string of the source as a regular expression for a whole message, which may begin with a place."""
    for path in [*(ROOT / "miles").rglob("*.py"), *ROOT.glob("plugins/*/*/miles_*/*.py")]:
        for parts in strings(ast.parse(path.read_text(encoding="utf-8"))):
            if sum(len(part) for part in parts if part) >= LITERAL:
                filled = (".*?" if part is None else re.escape(re.sub(r"\s+", " ", part)) for part in parts)
                yield re.compile("(?:[^:]+: )?" + "".join(filled))


@pytest.fixture(scope="module")
def sources():
    return list(patterns())


def test_the_page_is_read():
    assert len(quoted()) >= MESSAGES
    assert any(text.startswith("out of memory on rank 0: after 0 retries a micro-batch") for text in quoted())


@pytest.mark.parametrize("message", quoted(), ids=lambda text: text[:40])
def test_every_message_is_one_of_miles(message, sources):
    assert any(pattern.fullmatch(message) for pattern in sources), message


def test_a_message_that_nobody_says_is_not_taken_for_one(sources):
    for text in ("out of memory on rank 0: please buy a larger machine", "the run failed for a reason of its own"):
        assert not any(pattern.fullmatch(text) for pattern in sources)


def test_words_quoted_in_the_text_are_those_of_the_source():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "miles").rglob("*.py"))
    assert "one sample alone" in PAGE
    assert "one sample alone" in source


# -------------------------------------------------------------------------------------------------------------- metrics


def mixed(sample):
    """Different for the samples of a prompt, and raising for some."""
    if sample.id % 7 == 3:
        raise ValueError("cannot judge")
    return float(sample.id % 2)


class Echo:
    """Says once what the model said."""

    async def reset(self, prompt):
        return Observation(())

    async def step(self, action):
        return StepResult(({"role": "user", "content": action.text},), done=True)

    async def close(self):
        pass


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Names of every metric that a small run with evaluation, entropy, an environment and failures writes."""
    folder = tmp_path_factory.mktemp("run")
    spec = importlib.util.spec_from_file_location("stand_in", ROOT / "examples/qwen3-0.6b-grpo/stand_in.py")
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    stand_in.main(folder)
    rows = "".join(json.dumps({"input": f"{i}+{i}=", "label": str(2 * i)}) + "\n" for i in range(8))
    (folder / "sums.jsonl").write_text(rows)
    task = {"path": str(folder / "sums.jsonl"), "reward": mixed, "sampling": {"max_new_tokens": 4}}
    config = {
        "run": {"dir": str(folder / "run"), "num_threads": 1},
        "model": {"hf_checkpoint": str(folder / "model")},
        "data": {"sets": [{"name": "default", **task}, {"name": "SET", "environment": Echo, **task}]},
        "rollout": {"num_rollout": 2, "batch_size": 4, "n_samples_per_prompt": 4},
        "train": {"num_steps_per_rollout": 2},
        "eval": {"sets": [{"name": "heldout", **task}], "interval": 2},
    }
    miles.train(config)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}


def test_every_metric_is_written_by_a_run(written):
    named = set(re.findall(r"`((?:rollout|train|perf|eval|data|weight_sync)/[\w/@]+)`", PAGE))
    assert len(named) > 20
    assert named - written == set()


def test_the_table_of_contents_has_every_section():
    sections = re.findall(r"^## (.+)$", PAGE, re.M)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in sections]
    rows = [line for line in PAGE.splitlines() if line.startswith("| [")]
    linked = re.findall(r"\(#([\w-]+)\)", "\n".join(rows))
    assert sorted(linked) == sorted(anchors)
