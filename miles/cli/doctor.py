"""`miles doctor`: what is installed here, what is missing, and for what."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator

from miles.cli import Call
from miles.diagnosis.report import Doctor, Report
from miles.errors import ConfigError

HELP = """usage: miles doctor [--json] [--all] [--online]

Looks at packages, plugins, accelerators, the machine, disks and the environment, and says what can be done here.
Exit code 0 when examples/quickstart can run on this machine's CPU, else 1.
  --json      everything as JSON, facts included
  --all       absent optional parts, too, that nothing installed could use
  --online    ask the hub whether it answers; nothing is connected to without it"""
SHOWN = {"ok": "ok", "info": "-", "warn": "WARN", "missing": "missing", "fault": "FAULT"}
WIDTH = 118


def run(call: Call) -> int:
    """Examine and print."""
    if call.help:
        print(HELP)
        return 0
    as_json, everything, online = call.take("--json"), call.take("--all"), call.take("--online")
    if call.words:
        raise ConfigError(f"miles doctor does not take {call.words[0]!r}; see `miles doctor --help`")
    report = Doctor(call.blocked, online).examine()
    print(json.dumps(report.as_json(), indent=2) if as_json else "\n".join(_lines(report, everything)))
    return report.exit_code


def _lines(report: Report, everything: bool) -> Iterator[str]:
    for section in report.sections:
        findings = [f for f in section.findings if everything or f.facts.get("usable", True) or f.mark != "missing"]
        if not findings:
            continue
        yield section.name
        width = min(max(len(finding.name) for finding in findings), 20)
        for finding in findings:
            mark = f"  {SHOWN[finding.mark]:<8}"
            if len(finding.name) <= width:
                yield from _wrapped(f"{mark}{finding.name:<{width}}  ", finding.found)
            else:
                yield from _wrapped(mark, f"{finding.name}: {finding.found}")
            if finding.remedy:
                indent = width + 12 if len(finding.name) <= width else 10
                yield from _wrapped(" " * indent + "do: ", finding.remedy)
        yield ""
    yield "what can be done here"
    for verdict in report.verdicts:
        told = verdict.why or verdict.how
        yield from _wrapped(f"  {'yes' if verdict.can else 'no':<8}", verdict.what + (f": {told}" if told else ""))


def _wrapped(lead: str, text: str) -> list[str]:
    """Text behind a lead, its further lines below where it began."""
    return textwrap.wrap(
        " ".join(text.split()), max(WIDTH, len(lead) + 40), initial_indent=lead, subsequent_indent=" " * len(lead),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
