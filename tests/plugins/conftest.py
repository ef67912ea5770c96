"""Plugin distributions made of a folder: a module, and a `.dist-info` with its entry point."""

import sys
import textwrap

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("miles-x", {"x": "module source"})` puts a distribution with those plugins on the path."""
    created = []

    def install(distribution, plugins, version="1.0", folder=None, modules=None):
        site = tmp_path / (folder or distribution)
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = []
        for name, source in plugins.items():
            module = f"{(folder or distribution).replace('-', '_')}_{name}_plugin"
            (site / f"{module}.py").write_text(textwrap.dedent(source))
            lines.append(f"{name} = {module}")
            created.append(module)
        for name, source in (modules or {}).items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
            created.append(name)
        (info / "entry_points.txt").write_text("[miles]\n" + "\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(site))
        return site

    yield install
    for module in created:
        sys.modules.pop(module, None)
