"""One HTML file with everything in it: no server, no network, opened from disk."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import IO, Any

import yaml

from miles import __version__
from miles.errors import ConfigError
from miles.kinds import KINDS
from miles.log import logger
from miles.report.blocks import BlockWriter
from miles.report.runs import RunRecord, differences, labels, read_run
from miles.report.samples import SampleWriter, Selection, Sizes, choose, read_samples
from miles.report.vocabulary import load_tokenizer, token_texts
from miles.rundir import plain

HERE = Path(__file__).parent
SCRIPTS = (
    "dom.js", "blocks.js", "catalogue.js", "curves.js", "timing.js", "overview.js", "samples.js", "list.js",
    "tokens.js", "viewer.js", "main.js",
)  # fmt: skip
"""In this order they are one program."""
REPORT = "report.html"


def write_report(directories: Sequence[Path], out: Path, selection: Selection | None = None) -> list[str]:
    """Write the report of one run, or of several beside each other, to `out`; returns notes on what it lacks.

    The file is written under another name first: what lies at `out` is whole.

    Raises:
        ConfigError: a directory is no run, or `out` cannot be written.
    """
    selection = selection or Selection()
    runs = [read_run(directory) for directory in directories]
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("wb") as page:
            write_page(page, runs, selection)
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {out}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
    several = len(runs) > 1
    return [
        f"{label}: {note}" if several else note
        for run, label in zip(runs, labels(runs), strict=True)
        for note in run.notes
    ]


def leave_report(directory: Path) -> None:
    """At the end of a run: write its report and say where it is. One that cannot be written is a warning."""
    try:
        for note in write_report([directory], directory / REPORT):
            logger.warning("report: %s", note)
        logger.info("report: %s", directory / REPORT)
    except (Exception, KeyboardInterrupt) as error:
        logger.warning("there is no report: %s: %s; try `miles report %s`", type(error).__name__, error, directory)


def write_page(page: IO[bytes], runs: Sequence[RunRecord], selection: Selection) -> None:
    """The template, with blocks of data where it has its mark, the smallest and most wanted first."""
    program = "".join(f"// {name}\n{(HERE / name).read_text(encoding='utf-8')}\n" for name in SCRIPTS)
    program = f'"use strict";\n(() => {{\n{program}}})();\n'
    title = " · ".join(labels(runs))
    before, after = (HERE / "template.html").read_text(encoding="utf-8").split("{{blocks}}")
    # The style and the program are ours; the title is somebody's, so it comes last: nothing is looked for in it.
    for mark, text in {
        "{{digest}}": base64.b64encode(hashlib.sha256(program.encode()).digest()).decode(),
        "{{style}}": (HERE / "style.css").read_text(encoding="utf-8"),
        "{{title}}": html.escape(f"{title} · miles"),
    }.items():
        before = before.replace(mark, text)
    page.write(before.encode())
    blocks = BlockWriter(page)
    sizes = [choose(run, selection, len(runs)) for run in runs]
    samples = SampleWriter(blocks, len(runs))
    known = [len(run.notes) for run in runs]  # what turns out while samples are read follows in `ending`
    blocks.json("overview", overview(runs, sizes))
    page.write(plotly_block())
    page.write(f"<script>{program}</script>\n".encode())
    for number, (run, size) in enumerate(zip(runs, sizes, strict=True)):
        for step, path, limit in size.taken:
            for record in read_samples(path, limit, run.notes):
                samples.add(record, number, step)
    samples.finish()
    blocks.json("vocabulary", vocabularies(runs, samples.used))
    blocks.json("ending", {"notes": [run.notes[count:] for run, count in zip(runs, known, strict=True)]})
    page.write(after.encode())


def overview(runs: Sequence[RunRecord], sizes: Sequence[Sizes]) -> dict[str, Any]:
    """Everything but the samples."""
    return {
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": __version__,
        "runs": [
            {
                "label": label,
                "directory": str(run.directory),
                "status": run.status,
                "summary": plain(run.summary),
                "ended": run.ended,
                "config": plain(run.config),
                "settings": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
                "plugins": [{**plugin, "components": offers(plugin.get("components"))} for plugin in run.plugins],
                "metrics": run.columns(),
                "samples": size.samples,
                "left_out": size.left_out,
                "why_no_samples": size.why_none,
                "notes": run.notes,
            }
            for run, label, size in zip(runs, labels(runs), sizes, strict=True)
        ],
        "differences": differences([run.config for run in runs]),
    }


def offers(components: Any) -> list[str]:
    """What a plugin offers, a kind each: `reward: environment`, `policy losses: ppo_clip, reinforce`."""
    return [f"{_kind(kind, len(names))}: {', '.join(names)}" for kind, names in (components or {}).items()]


def _kind(name: str, count: int) -> str:
    words = KINDS[name].singular if name in KINDS and count == 1 else name.replace("_", " ")
    return f"importance-sampling {words[3:]}" if words.startswith("is ") else words


def vocabularies(runs: Sequence[RunRecord], used: Sequence[set[int]]) -> list[dict[str, Any]]:
    """For each run the texts of its tokens; without its tokenizer none, and a note."""
    found = []
    for run, numbers in zip(runs, used, strict=True):
        ids, texts = sorted(numbers), None
        if ids:
            try:
                texts = token_texts(load_tokenizer(run), ids)
            except Exception as error:  # whatever a tokenizer of somebody's raises, the samples can be shown without
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                run.notes.append(f"tokens are shown as numbers: the tokenizer could not be loaded ({reason[:300]})")
        found.append({"ids": ids if texts else [], "texts": texts or []})
    return found


@cache
def plotly_block() -> bytes:
    """plotly.js out of the plotly package, as a block."""
    spec = importlib.util.find_spec("plotly")  # found, not imported: only the file is wanted
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the report's charts need plotly: pip install plotly")
    library = Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    page = io.BytesIO()
    BlockWriter(page).raw("plotly", library.read_bytes())
    return page.getvalue()
