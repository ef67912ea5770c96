"""Lines of the spine, of the rest, and of the plugins: what is not blank, not a comment and not a docstring.

The spine is what every run passes through; the rest is components, what only components use, and what stands around
a run (command line, report, testing, lists of public names, tables of names).

python scripts/size.py
"""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
REST = (
    "builtins", "cli", "bench", "report", "diagnosis", "testing", "templates", "data", "hermes.py", "tools.py",
    "turns.py", "weights.py", "buckets.py", "checkpoint_io.py", "rollout/saved.py", "rollout/values.py",
    "rollout/dump.py", "rollout/replay.py", "config/replay.py", "evaluate.py", "shipment.py", "training/episodes.py",
    "training/logprobs.py", "training/statistics.py", "training/surrogate.py", "toolkit.py", "workers", "api.py",
    "catalog.py", "rundir.py", "durable.py", "config/upstream.py", "environments.py",
)  # fmt: skip
"""What of miles/ is not the spine."""


def code_lines(source: str) -> int:
    """Lines that are neither blank nor a comment nor part of a docstring (a string that is a statement of its own)."""
    silent: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(number not in silent and line.strip()[:1] not in ("", "#") for number, line in lines)


def function_lengths(source: str) -> dict[str, int]:
    """Name -> lines from `def` to its end, docstring left out."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            first = node.body[0]
            doc = 0
            if ast.get_docstring(node) is not None:
                doc = (first.end_lineno or first.lineno) - first.lineno + 1
            lengths[f"{node.name}:{node.lineno}"] = len(text.splitlines()) - doc
    return lengths


def parts() -> dict[str, list[Path]]:
    """`spine`, `rest` and `plugins` -> source files, tests left out."""
    core = sorted((ROOT / "miles").rglob("*.py"))
    beside = [path for path in core if path.relative_to(ROOT / "miles").as_posix().startswith(REST)]
    plugins = [path for path in sorted((ROOT / "plugins").rglob("*.py")) if "tests" not in path.parts]
    return {"spine": [path for path in core if path not in beside], "rest": beside, "plugins": plugins}


def main() -> None:
    for name, files in parts().items():
        counts = [code_lines(path.read_text(encoding="utf-8")) for path in files]
        longest = max(files, key=lambda path: len(path.read_text(encoding="utf-8").splitlines()), default=None)
        about = f"median {median(counts):.0f}, longest {longest.relative_to(ROOT)}" if longest else ""
        print(f"{name:<8} {sum(counts):>6} lines in {len(files):>3} files   {about}")


if __name__ == "__main__":
    main()
