"""What must be the same in every worker for results to mean anything: versions of Python and the libraries."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("miles", "miles-ray", "torch", "transformers", "ray")


def versions() -> dict[str, str]:
    """Of this process. Without what follows a `+`: a driver without a GPU may have another build of torch."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def differences(driver: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for each node whose versions are not the driver's.

    Example:
        >>> differences({"torch": "2.13.0"}, {"10.0.0.2": {"torch": "2.12.1"}})
        ['10.0.0.2: torch 2.12.1, not 2.13.0']
    """
    lines = []
    for node, there in sorted(nodes.items()):
        names = sorted(name for name in {*driver, *there} if driver.get(name) != there.get(name))
        faults = [f"{name} {there.get(name, 'none')}, not {driver.get(name, 'none')}" for name in names]
        if faults:
            lines.append(f"{node}: {'; '.join(faults)}")
    return lines
