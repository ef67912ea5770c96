"""All sections, and what follows from them: what can be done here, and what cannot because of what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from miles import __version__
from miles.diagnosis.finding import TRAINING, Finding, Job, Section, examine
from miles.targets import import_target

SCHEMA = 1
"""Of the JSON. A program that reads it can rely on the keys of this number; new ones may be added."""
QUICKSTART = frozenset(
    {
        ("bridges", "qwen"),
        ("chat_formats", "qwen3"),
        ("precision_schemes", "plain"),
        ("train_backends", "fsdp"),
        ("rollout_engines", "torch"),
        ("weight_syncs", "inprocess"),
        ("executors", "inprocess"),
        ("data_sources", "files"),
        ("generate_functions", "single_turn"),
        ("generate_functions", "dataset"),
        ("rewards", "exact_match"),
        ("advantage_estimators", "grpo"),
        ("policy_losses", "ppo_clip"),
        ("policy_losses", "sft"),
        ("evaluators", "rollout"),
        ("trackers", "jsonl"),
    }
)
"""(kind, name) of what examples/quickstart is made of."""
PLACES = {"rollout_engines": "rollout engine", "train_backends": "train backend", "executors": "executor"}


@dataclass(frozen=True)
class Verdict:
    """Whether one thing can be done."""

    what: str
    can: bool
    why: str = ""
    """Empty when it can."""
    how: str = ""
    """How far, where that is not all that one could expect."""


@dataclass(frozen=True)
class Report:
    """What `miles doctor` says."""

    sections: tuple[Section, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def exit_code(self) -> int:
        """0 when the quickstart can run on the CPU of this machine."""
        return 0 if self.verdicts[0].can else 1

    def as_json(self) -> dict[str, Any]:
        sections = [{"name": s.name, "findings": [asdict(finding) for finding in s.findings]} for s in self.sections]
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return {
            "schema": SCHEMA, "miles": __version__, "sections": sections, "verdicts": verdicts,
            "exit_code": self.exit_code,
        }  # fmt: skip


class Doctor:
    """One examination. What a check needs is imported when it runs: a missing library stops that check alone."""

    def __init__(self, blocked: Sequence[str] = (), online: bool = False):
        self.blocked, self.online = tuple(blocked), online

    def examine(self) -> Report:
        with ThreadPoolExecutor(1) as beside:  # the slow part waits for another process
            gather = import_target("miles.diagnosis.probe:gather")
            self._probe: Future[Any] = beside.submit(gather, self.blocked)
            return self._report()

    def _report(self) -> Report:
        sections = (
            examine("packages", _lazily("installed:packages"), _lazily("installed:plugin_packages")),
            examine("plugins", self._plugins),
            examine("accelerator", self._devices),
            examine("compute", self._compute),
            examine("components", self._components),
            examine("machine", *map(_lazily, ("machine:cores", "machine:load", "machine:memory"))),
            examine("disk", _lazily("machine:folders")),
            examine("process", *map(_lazily, ("machine:limits", "machine:encoding", "machine:clock"))),
            examine("hub", _lazily("surroundings:hub", self.online)),
            examine("environment", _lazily("surroundings:environment")),
            examine("optional parts", self._optional_parts),
        )
        return Report(sections, tuple(self._verdicts([f for s in sections for f in s.findings])))

    @property
    def _facts(self) -> Any:
        return self._probe.result()

    @cached_property
    def _loaded(self) -> Any:
        return import_target("miles.plugins:load_plugins")(block=self.blocked, strict=False)

    def _plugins(self) -> Iterator[Finding]:
        plugins = self._loaded
        for info in plugins.infos.values():
            facts = {"distribution": info.distribution, "version": info.version, "api": info.api}
            yield Finding(
                info.name, "ok", f"{info.distribution} {info.version}, API {info.api or 'not stated'}", facts=facts
            )
        for name in plugins.blocked:
            yield Finding(name, "info", "left out")
        for fault in plugins.faults:
            remedy = "repair or uninstall it; -p no:NAME leaves it out"
            yield Finding("loading", "fault", str(fault), remedy, TRAINING)
        for conflict in import_target("miles.registry:Registry")(plugins).conflicts():
            yield Finding("names", "warn", str(conflict), "matters only where that name is used")

    def _devices(self) -> Iterator[Finding]:
        from miles.diagnosis.accelerator import cards, devices

        return devices(self._facts, cards())

    def _compute(self) -> Iterator[Finding]:
        from miles.diagnosis.accelerator import compute

        return compute(self._facts)

    def _components(self) -> Iterator[Finding]:
        """Faults of components, and one line for all that are well."""
        transformers, found = self._facts["transformers"], self._facts["components"]
        if "error" in transformers:
            problem = f"cannot be imported: {transformers['error']}"
            remedy = "pip install --force-reinstall 'transformers>=5.12,<5.18'"
            yield Finding("transformers", "fault", problem, remedy, TRAINING)
        if "error" in found:
            yield Finding("components", "fault", found["error"], "repair what is named there", TRAINING)
            return
        known = {self._facts[library].get("error") for library in ("torch", "transformers")} - {None}
        for reason, ones in _by_reason(found["components"]).items():
            names = ", ".join(one["title"] for one in ones[:2]) + (
                f" and {len(ones) - 2} more" if len(ones) > 2 else ""
            )
            needed = any((one["kind"], one["name"]) in QUICKSTART for one in ones)
            facts = {"components": [[one["kind"], one["name"]] for one in ones]}
            said = any(reason.endswith(error) for error in known)
            remedy = (
                "as above" if said else "`miles plugins doctor` lists each; pip install what it lacks, or -p no:NAME"
            )
            stops = TRAINING if needed and not said else ()
            yield Finding(names, "fault", reason, remedy, stops, facts)
        well = sum(not one["faults"] for one in found["components"])
        yield Finding("registered", "ok", f"{well} of {len(found['components'])} can be used", facts={"usable": well})

    def _optional_parts(self) -> Iterator[Finding]:
        offered = {(offer.kind, offer.name) for offer in self._loaded.registrations}
        return import_target("miles.diagnosis.installed:optional_parts")(offered)

    # ------------------------------------------------------------------------------------------------------- verdicts

    def _verdicts(self, findings: Sequence[Finding]) -> Iterator[Verdict]:
        def reasons(*jobs: Job) -> str:
            those = [f"{f.name}: {f.found}" for f in findings if set(f.stops) & set(jobs)]
            return "; ".join(those[:3]) + (f"; and {len(those) - 3} more" if len(those) > 3 else "")

        for what, why in (("train on CPU", reasons("training")), ("train on GPU", reasons("training", "gpu"))):
            yield Verdict(what, not why, why)
        components = self._facts["components"].get("components", ())
        unserved = import_target("miles.diagnosis.installed:unserved")()
        for kind, place in PLACES.items():
            known = {
                one["name"]: "; ".join(one["faults"]) or unserved.get((kind, one["name"]), "")
                for one in components
                if one["kind"] == kind
            }
            for name, distributions in _promised(kind).items():
                known.setdefault(name, f"no installed plugin offers it (that would be {distributions})")
            for name in sorted(known):
                how = self._reach() if kind == "train_backends" and not known[name] else ""
                yield Verdict(f"{place} {name}", not known[name], known[name], how)

    def _reach(self) -> str:
        """How far training reaches with the executors that are installed."""
        reach = [offer.value.provides for offer in self._loaded.registrations if offer.kind == "executors"]
        if all("one rank" in provides for provides in reach):
            return "in one process, on one device: no installed executor starts several ranks"
        if all({"one rank", "one node"} & set(provides) for provides in reach):
            return "on this machine, in one process or several: an executor for several machines is miles-ray"
        return "in one process, in several, on several machines"


def _by_reason(components: Sequence[Any]) -> dict[str, list[Any]]:
    """What is wrong -> the components that it is wrong with: one broken library stops many."""
    reasons: dict[str, list[Any]] = {}
    for one in components:
        for fault in one["faults"]:
            lead, _, error = fault.partition(": ")
            reasons.setdefault(
                f"cannot be imported: {error}" if lead.startswith("cannot import ") else fault, []
            ).append(one)
    return reasons


def _promised(kind: str) -> dict[str, str]:
    """Name -> distribution of ours that offers it, installed or not."""
    from miles.catalog import PROVIDERS

    return {name: distribution for distribution, names in PROVIDERS.get(kind, {}).items() for name in names}


def _lazily(target: str, *arguments: Any) -> Any:
    """A check that is imported when it is called, under its own name."""

    def check(*given: Any) -> Any:
        return import_target(f"miles.diagnosis.{target}")(*given)

    check.__name__ = target.partition(":")[2]
    return partial(check, *arguments)
