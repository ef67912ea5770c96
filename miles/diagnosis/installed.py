"""Distributions: what miles and its plugins ask for, and the optional parts that serve one purpose each."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from miles.diagnosis.finding import TRAINING, Finding
from miles.kinds import KINDS

CORE = "miles"


def packages() -> Iterator[Finding]:
    """Python, miles, and everything it declares that it needs."""
    try:
        declared = metadata(CORE)
    except PackageNotFoundError:
        yield Finding(
            "miles", "fault", "runs from its source, but is not installed: no plugin can be found",
            "pip install -e . in the folder of miles (scripts/setup.sh does that)", TRAINING,
        )  # fmt: skip
        return
    wanted, here = SpecifierSet(declared["Requires-Python"] or ""), platform.python_version()
    fits = wanted.contains(here, prereleases=True)
    yield Finding(
        "python", "ok" if fits else "fault", f"{here}{'' if fits else f' is outside {wanted}'}",
        "" if fits else "make an environment with another Python: PYTHON=python3.12 scripts/setup.sh",
        () if fits else TRAINING, {"version": here, "range": str(wanted)},
    )  # fmt: skip
    yield Finding("miles", "ok", version(CORE), facts={"version": version(CORE)})
    for requirement in requirements(CORE):
        yield judged(requirement, CORE, TRAINING)


def requirements(distribution: str) -> list[Requirement]:
    """What a distribution needs here, extras left out; nothing where it is not installed."""
    try:
        every = [Requirement(text) for text in requires(distribution) or ()]
    except PackageNotFoundError:
        return []
    return [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]


def judged(requirement: Requirement, who: str, stops: Sequence) -> Finding:
    """One requirement: is it there, and in its range?"""
    name, wanted = requirement.name, str(requirement.specifier) or "any version"
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        here = version(name)
    except PackageNotFoundError:
        return Finding(
            name, "missing", f"not installed; {who} needs {wanted}", fix, tuple(stops),
            {"version": None, "range": wanted, "needed_by": who},
        )  # fmt: skip
    facts = {"version": here, "range": wanted, "needed_by": who}
    if requirement.specifier.contains(here, prereleases=True):
        return Finding(name, "ok", f"{here} ({wanted})", facts=facts)
    return Finding(name, "fault", f"{here} is outside {wanted}, which {who} needs", fix, tuple(stops), facts)


def plugin_packages() -> Iterator[Finding]:
    """What distributions with plugins need beyond miles; only what is not as it should be."""
    found = sorted({point.dist.name for point in entry_points(group="miles") if point.dist} - {CORE})
    for distribution in found:
        for requirement in requirements(distribution):
            finding = judged(requirement, distribution, ())
            if finding.mark != "ok":
                yield finding


# ------------------------------------------------------------------------------------------------------ optional parts


@dataclass(frozen=True)
class Part:
    """Something that miles does without until it is asked for what this is for."""

    name: str
    """Of the distribution, or of a program."""
    purpose: str
    install: str
    serves: tuple[str, str] | None = None
    """(kind, name) of the component that needs it: of no use as long as nobody offers that."""
    programs: tuple[str, ...] = ()
    """What a program may be called; empty for distributions."""


PARTS = (
    Part("datasets", "prompts from hub data sets (--prompt-data hub:owner/name)", "pip install 'miles[hub]'"),
    Part("tensorboard", "the tracker tensorboard", "pip install 'miles[tensorboard]'", ("trackers", "tensorboard")),
    Part("plotly", "the charts of the report", "pip install plotly"),
    Part("wandb", "the tracker wandb", "pip install miles-wandb", ("trackers", "wandb")),
    Part("flash-attn", "--attention flash; sdpa and flex need nothing", "pip install flash-attn --no-build-isolation"),
    Part("triton", "the torch engine's decode kernel, on a GPU", "comes with CUDA builds of torch"),
    Part("sglang", "SGLang as the rollout engine", "pip install 'miles-sglang[server]'", ("rollout_engines", "sglang")),
    Part("megatron-core", "Megatron-Core as the train backend, and the test of a seam to it (docs/seams.md)",
         "pip install megatron-core==0.16.1", ("train_backends", "megatron")),
    Part("transformer-engine", "Megatron-Core on packed sequences",
         "pip install 'transformer-engine[pytorch]'", ("train_backends", "megatron")),
    Part("deep_gemm", "fp8 matrix products", "build it from its repository", ("precision_schemes", "fp8")),
    Part("ray", "workers on several machines", "pip install miles-ray", ("executors", "ray")),
    Part("chromium", "tests that open the report in a browser", "your system's package chromium",
         programs=("chromium", "chromium-browser", "google-chrome")),
)  # fmt: skip


def unserved() -> dict[tuple[str, str], str]:
    """(kind, name) of components that wrap another package and find none of it here -> what to install."""
    missing: dict[tuple[str, str], str] = {}
    for part in reversed(PARTS):
        if part.serves is not None:
            missing[part.serves] = f"{part.name} is not installed: {part.install}"
    here = {part.serves for part in PARTS if not part.programs and _version(part.name) is not None}
    return {component: why for component, why in missing.items() if component not in here}


def optional_parts(offered: set[tuple[str, str]]) -> Iterator[Finding]:
    """What is there of `PARTS` and not needed anyway. `offered`: (kind, name) of every registered component."""
    needed = {requirement.name for requirement in requirements(CORE)}
    for part in (part for part in PARTS if part.name not in needed):
        here = _program(part) if part.programs else _version(part.name)
        unused = part.serves is not None and part.serves not in offered
        purpose = part.purpose
        if unused and part.serves is not None:
            kind, name = part.serves
            purpose += f"; miles cannot use it yet: no installed plugin offers {KINDS[kind].singular} {name!r}"
        facts = {"version": here, "usable": not unused}
        if here is not None:
            yield Finding(part.name, "info" if unused else "ok", f"{here}: for {purpose}", facts=facts)
        else:
            yield Finding(part.name, "missing", f"for {purpose}", "" if unused else part.install, facts=facts)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _program(part: Part) -> str | None:
    return next((path for path in map(shutil.which, part.programs) if path), None)
