"""Caps on files and functions, names that say nothing, things that are never committed."""

import ast
import re
from statistics import median

import pytest

FILE_CAP, FUNCTION_CAP, SPINE_CAP = 500, 80, 7_373


def ours(sources):
    return {path: text for path, text in sources.items() if path.split("/")[0] in ("miles", "plugins", "scripts")}


def test_what_counts_as_a_line(size):
    source = '"""Doc.\n\nMore."""\n\nx = 1  # one\n# no\nclass A:\n    """Doc."""\n\n    y = """t"""\n    """Of y."""\n'
    assert size.code_lines(source) == 3  # x, class, y
    function = 'def f(a,\n      b):\n    """Doc\n\n    more."""\n    return a\n'
    assert size.function_lengths(function) == {"f:1": 3}


def test_the_parts_of_the_house(size, root):
    parts = size.parts()
    assert root / "miles" / "loop.py" in parts["spine"]
    assert root / "miles" / "cli" / "train.py" in parts["rest"]
    assert not any("tests" in path.parts for path in parts["plugins"])


def test_files_are_short(sources, size):
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    assert {path: n for path, n in lengths.items() if n > FILE_CAP} == {}
    code = [size.code_lines(text) for path, text in ours(sources).items() if text.strip()]
    assert median(code) <= 120


def test_functions_are_short(sources, size):
    long = {}
    every = []
    for path, text in ours(sources).items():
        lengths = size.function_lengths(text)
        every += lengths.values()
        long |= {f"{path}:{name}": n for name, n in lengths.items() if n > FUNCTION_CAP}
    assert long == {}
    assert median(every) <= 12


def test_the_spine_is_small(size):
    assert sum(size.code_lines(path.read_text()) for path in size.parts()["spine"]) <= SPINE_CAP


def test_names_say_what_a_file_is_for(sources):
    vague = re.compile(r"(^|_)(utils?|helpers?|managers?|hub|misc|common)(_|$)")
    for path in sources:
        for part in path.removesuffix(".py").split("/"):
            assert not vague.search(part), path


def test_test_folders_are_no_packages(sources):
    assert [
        path for path in sources if path.endswith("tests/__init__.py") or re.search(r"tests/.*__init__\.py", path)
    ] == []


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"])
def test_nothing_is_left_for_later(sources, word):
    assert [path for path, text in sources.items() if re.search(rf"\b{word}\b", text)] == []


def test_no_exception_is_swallowed_in_silence(sources):
    silent = []
    for path, text in ours(sources).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                if broad and all(isinstance(line, ast.Pass) for line in node.body):
                    silent.append(f"{path}:{node.lineno}")
    assert silent == []


def test_every_public_module_says_what_it_is(sources):
    without = [
        path
        for path, text in ours(sources).items()
        if text.strip() and not ast.get_docstring(ast.parse(text)) and "/tests/" not in path
    ]
    assert without == []
