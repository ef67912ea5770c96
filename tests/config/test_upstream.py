"""Every flag of slime and Miles is accepted or answered, on the real command line, as the one table says."""

import importlib.util
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from miles.config.arguments import UNKNOWN_FLAG, read_arguments
from miles.config.faults import ConfigFaults
from miles.config.leaves import flag_table
from miles.config.settings import Flattener
from miles.config.upstream import (
    ACCEPTED,
    LATER,
    PREFIXES,
    RENAMED,
    REPLACED,
    SWITCHES,
    UNSUPPORTED,
    VALUES,
    answer_to,
    answers,
)
from miles.registry import Registry

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("migrating_script", ROOT / "scripts" / "migrating.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


migrating = load_script()
LISTED = migrating.upstream_flags()
FLAGS = [flag for flag in LISTED if flag.group != migrating.VALUE_GROUP]
NAMES = sorted({flag.name for flag in FLAGS})


@pytest.fixture(scope="module")
def fates():
    return migrating.Fates()


@pytest.fixture
def read(plugins):
    """What the parser of the command line finds wrong with some words."""

    def read(*words):
        return read_arguments(words, Registry(plugins), Flattener([], lambda kind, thing: "")).faults

    return read


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_is_taken_or_refused_as_the_table_says(name, fates, read):
    flag = f"--{name}"
    fate = fates.of(next(listed for listed in FLAGS if listed.name == name))
    words = [flag, "a", "b"] if name == migrating.EVAL_PROMPT_DATA else [flag, "1"]
    faults = read(*words[:1] if name in flag_table() and flag_table()[name].is_bool else words)
    if fate.kind == "same":
        assert not [fault for fault in faults if fault.problem == UNKNOWN_FLAG or flag in fault.key]
        return
    (fault,) = faults
    assert fault.key == flag
    assert fate.text in f"{fault.problem} {fault.remedy}"
    assert fate.kind in ("renamed", "replaced") or fate.kind in fault.problem


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_the_new_spelling_of_a_flag_is_accepted(name, read):
    assert read(*RENAMED[name].replace("VALUE", "7").split()) == []


@pytest.mark.parametrize("flag", [flag.name for flag in LISTED if flag.group == migrating.VALUE_GROUP])
def test_a_name_of_upstream_is_known_or_answered(flag, solve, fates):
    option, _, name = flag.partition("=")
    fate = fates.of(migrating.UpstreamFlag(migrating.VALUE_GROUP, flag, ""))
    if fate.kind == "same":
        apart = ["--rollout-num-engines", "1"] if name == "broadcast" else []  # there is nobody to send to otherwise
        assert solve((), f"--{option}", name, *apart).config
    else:
        with pytest.raises(ConfigFaults) as caught:
            solve((), f"--{option}", name)
        assert fate.text in str(caught.value)


def test_no_flag_is_answered_twice_and_none_that_the_core_accepts(fates):
    tables = (REPLACED, LATER, UNSUPPORTED)
    every = Counter([*RENAMED, *(name for table in tables for _, names in table for name in names.split())])
    assert [name for name, count in every.items() if count > 1] == []
    assert [name for name in every if f"--{name}" in flag_table() or name in SWITCHES] == []
    assert set(SWITCHES) <= set(NAMES)
    assert {f"--{name}" for name in ACCEPTED} <= {*flag_table(), *fates.components}


def test_nothing_is_answered_that_upstream_does_not_have():
    assert set(answers()) - set(NAMES) == set()
    values = {flag.name.partition("=")[2] for flag in LISTED if flag.group == migrating.VALUE_GROUP}
    assert {name for _, name in VALUES} - values == set()
    assert len(NAMES) > 500
    assert len(NAMES) == len(set(NAMES))


def test_the_flags_that_answers_name_exist(fates):
    """In replies that tell what to write; a pattern such as `--torch-...` names none."""
    replies = [*RENAMED.values(), *(text for text, _ in REPLACED), *(answer.text for answer in VALUES.values())]
    for flag in re.findall(r"--[a-z][\w-]*[a-z](?![\w.-])", " ".join(replies)):
        positive = flag.replace("--no-", "--", 1)
        known = {*flag_table(), *fates.components}
        assert flag in known or positive in known, flag


def test_packages_that_answers_plan_do_not_exist_yet():
    """Once one does, its flags are accepted through its components, and what is left of its row wants an answer."""
    folders = {folder.name for folder in (ROOT / "plugins").glob("*/miles-*")}
    texts = [text for text, _ in LATER]
    answered = (*PREFIXES.values(), *VALUES.values())
    texts += [answer.text for answer in answered if answer.fate == "not in this version"]
    planned = set(re.findall(r"\((miles-[a-z-]+)\)", " ".join(texts)))
    assert planned
    assert planned & folders == set()


def test_flags_with_one_answer_are_one_problem(solve):
    with pytest.raises(ConfigFaults) as caught:
        solve((), "--swiglu", "--num-layers", "28", "--optimizer", "adam", "--normalization", "RMSNorm", "--swiglu")
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 problems in the configuration:"
    told = [line.strip() for line in lines if line.startswith("  --")]
    assert told == ["--swiglu, --num-layers, --normalization", "--optimizer"]


def test_families_that_are_handed_through_are_answered_and_options_of_the_engine_taken(read):
    assert read("--sglang-mem-fraction-static", "0.7") == []
    assert "pip install miles-sglang" in answer_to("--sglang-mem-fraction-static").remedy
    assert read("--torch-max-running", "5") == []
    assert read("--sglang-server-concurrency", "5") == []
    assert answer_to("--router-policy").remedy == "write --sglang-router-... VALUE"


@pytest.mark.parametrize(
    ("words", "balance"),
    [
        ("--balance-data", "tokens"),
        ("--balance-by-flops", "flops"),
        ("--balance-data --balance-by-flops", "flops"),
        ("--balance-by-flops --balance-data", "flops"),
        ("--balance none --balance-data", "none"),
        ("--balance-by-flops --balance none", "none"),
    ],
)
def test_switches_that_stand_for_a_value(solve, words, balance):
    """Miles balances by FLOPs when both are given, in any order."""
    assert solve((), *words.split()).config.train.balance == balance


def test_a_switch_outdoes_a_file(solve):
    resolved = solve([{"train": {"balance": "none"}}], "--balance-data")
    assert (resolved.config.train.balance, str(resolved.origin("train.balance"))) == ("tokens", "--balance-data")


def test_a_flag_of_nobody_stays_unknown(read):
    (fault,) = read("--rollout-bach-size", "3")
    assert (fault.problem, fault.remedy) == (UNKNOWN_FLAG, "did you mean --rollout-batch-size or --micro-batch-size?")
    assert answer_to("--rollout-bach-size") is None


def test_words_as_launch_scripts_write_them(solve):
    """`--key=value`, switches with and without a value, the last of two winning, JSON, negative numbers."""
    config = solve(
        (), "--rollout-temperature=0.8", "--rollout-shuffle", "--lr", "1e-5", "--lr", "2e-5", "--rollout-top-k", "-1",
        "--apply-chat-template-kwargs", '{"enable_thinking": false}', "--use-dynamic-batch-size", "--no-offload-train",
        "--eval-prompt-data", "aime", "a.jsonl", "gpqa", "b.jsonl@[0:8]", "--eval-top-p", "0.7",
    ).config  # fmt: skip
    assert config.data.sets[0].sampling.temperature == 0.8
    assert config.data.shuffle
    assert config.optimizer.lr == 2e-5
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.resources.offload_train is False
    assert [(s.name, s.path, s.sampling.top_p, s.sampling.temperature) for s in config.eval.sets] == [
        ("aime", "a.jsonl", 0.7, 0.8),
        ("gpqa", "b.jsonl@[0:8]", 0.7, 0.8),
    ]


def test_the_placeholder_of_upstream_in_an_export_is_refused_before_the_run(solve):
    assert solve((), "--save-hf", "hf/{step}").config.checkpoint.save_hf == "hf/{step}"
    with pytest.raises(ConfigFaults, match=r"rollout_id.*only \{step\} is replaced"):
        solve((), "--save-hf", "hf/{rollout_id}")


# ------------------------------------------------------------------------------------------------------------ defaults


def test_differing_defaults_are_those_that_the_documentation_explains(fates):
    """docs/configuration.md says why; Miles' FSDP backend and components' options have defaults of their own."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]+?) \| [^|]+ \| [^|]+ \|$", text, re.M))
    computed = {
        f"--{flag.name}": migrating.shown(fates.of(flag).default)
        for flag in FLAGS
        if flag.group != "fsdp" and f"--{flag.name}" in flag_table() and fates.of(flag).default is not migrating.UNKNOWN
    }
    assert {flag: here.strip("`") for flag, here in table.items()} == computed
    assert len(computed) > 10


@pytest.mark.parametrize(
    ("text", "value"),
    [("512 * 1024 ** 2", 536870912), ("flag", False), ("None", None), ("1e-06", 1e-6), ("grpo", "grpo"), ("{}", {})],
)
def test_reading_defaults(text, value):
    assert migrating.parsed(text) == value


@pytest.mark.parametrize(
    ("theirs", "ours", "differ"),
    [
        ("1e-06", 1e-6, False), ("1", 8, True), ("–", 32, True), ("None", 256, True), ("None", (), False),
        ("flag", True, True), ("flag", False, False), ("bool?", None, False), ("0", 0.0, False), ("", 3, False),
        ("None", 0, True), ("0.0", None, True),
    ],
)  # fmt: skip
def test_comparing_defaults(theirs, ours, differ):
    assert migrating._differs(migrating.parsed(theirs), ours) is differ


# ------------------------------------------------------------------------------------------- a description of upstream

DESCRIPTION = """
Text that names --offload and --sglang-anything.

## Appendix A
- **cluster**: actor-num-nodes={nodes}; colocate=flag; offload-train-target=cpu {{cpu|disk}}
"""


def test_a_description_is_compared_flag_by_flag():
    assert migrating.against(DESCRIPTION.format(nodes=1)) == []
    assert migrating.against(DESCRIPTION.format(nodes=2)) == ["cluster actor-num-nodes 2"]
    assert migrating.against("Since then there is --brand-new." + DESCRIPTION.format(nodes=1)) == ["brand-new"]


@pytest.mark.skipif("MILES_UPSTREAM_REFERENCE" not in os.environ, reason="names a description of upstream's flags")
def test_the_list_agrees_with_the_description_of_upstream():
    text = Path(os.environ["MILES_UPSTREAM_REFERENCE"]).read_text(encoding="utf-8")
    assert len(migrating.described_flags(text)) > 340
    assert migrating.against(text) == []
