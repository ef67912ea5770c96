"""Who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

LAYERS = [
    {"__main__", "cli"},
    {"bench"},
    {"jobs", "diagnosis"},
    {"loop", "run", "build"},
    {"crew"},
    {
        "toolkit",
        "rollout",
        "training",
        "residency",
        "evaluate",
        "report",
        "tracking",
        "data",
        "modeling",
        "checkpoint",
        "interrupt",
        "workers",
    },
    {"determinism", "checkpoint_io", "rundir"},
    {"config"},
    {"registry"},
    {"plugins", "conformance", "options"},
    {"api"},
    {"hookspecs", "kinds", "hermes", "turns", "tools", "environments"},
    {"protocols", "contexts", "execution", "weights", "shipment", "experts", "buckets"},
    {"types"},
    {"component", "errors", "parts", "log", "targets", "catalog", "durable", "batches"},
]
"""Top-level modules of miles, from the command line down: each imports its own layer and those below it."""

ABOVE_COMPONENTS = {
    "cli",
    "jobs",
    "loop",
    "run",
    "build",
    "crew",
    "registry",
    "plugins",
    "report",
    "residency",
    "rollout",
}
"""What no component may import: what it needs of them arrives as an argument."""


def top(module):
    return module.split(".")[1]


def core(imports):
    """(path, own top-level module, imported top-level modules of miles)."""
    for path, names in imports.items():
        parts = path.removesuffix(".py").split("/")
        if parts[0] == "miles" and len(parts) > 1 and parts[1] != "__init__":
            known = {name for layer in LAYERS for name in layer} | {"builtins", "testing"}
            yield path, parts[1], {top(name) for name in names if name.startswith("miles.") and top(name) in known}


def test_every_module_has_a_layer(imports):
    known = {name for layer in LAYERS for name in layer} | {"builtins", "testing", "templates", "__init__"}
    assert {own for _, own, _ in core(imports)} - known == set()


def test_layers_import_downwards(imports):
    level = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{path} imports miles.{name}"
        for path, own, names in core(imports)
        if own in level
        for name in sorted(names)
        if name in level and level[name] < level[own]
    ]
    assert wrong == []


def test_the_core_knows_no_built_in_component(imports):
    wrong = [path for path, own, names in core(imports) if own != "builtins" and "builtins" in names]
    assert wrong == []


def test_built_in_components_import_nothing_above_them(imports):
    wrong = [
        f"{path} imports miles.{name}"
        for path, own, names in core(imports)
        if own == "builtins"
        for name in sorted(names & ABOVE_COMPONENTS)
    ]
    assert wrong == []


def test_built_in_components_get_by_with_what_plugins_have(imports):
    public = ("miles.api", "miles.toolkit", "miles.builtins")
    wrong = {
        f"{path} imports {name}"
        for path, own, _ in core(imports)
        if own == "builtins"
        for name in imports[path]
        if name.startswith("miles.") and not name.startswith(public)
    }
    assert wrong == set()


def test_plugin_files_import_only_the_api(imports):
    files = {path: names for path, names in imports.items() if path.endswith("/plugin.py") and "templates" not in path}
    assert len(files) > 3
    for path, names in files.items():
        package = path.split("/")[-2]
        own = ("miles.builtins",) if path == "miles/builtins/plugin.py" else (package,)
        of_ours = {name for name in names if re.match(r"miles(_\w+)?(\.|$)", name)}
        wrong = {name for name in of_ours if not name.startswith(("miles.api", *own))}
        assert wrong == set(), path


def plugin_sources(imports):
    for path, names in imports.items():
        parts = path.split("/")
        if parts[0] == "plugins" and "tests" not in parts:
            yield path, parts, names


def test_plugins_import_the_two_public_modules_and_what_they_depend_on(imports, root):
    for path, parts, names in plugin_sources(imports):
        project = tomllib.loads((root.joinpath(*parts[:3]) / "pyproject.toml").read_text())["project"]
        needs = [re.split(r"[^\w.-]", need)[0].replace("-", "_") for need in project["dependencies"]]
        for name in names:
            package = name.split(".")[0]
            if package == "miles" and parts[4:] == ["command.py"]:
                continue  # a command that a plugin brings: it puts parts together, as those of miles.cli do
            if package == "miles":
                assert name.startswith(("miles.api", "miles.toolkit", "miles.testing")), f"{path} imports {name}"
            elif package.startswith("miles_") and package != parts[3]:
                assert package in needs, f"{path} imports {package}, which {project['name']} does not depend on"


def test_examples_import_installed_names_only(imports):
    for path, names in imports.items():
        if path.startswith("examples/"):
            wrong = {name for name in names if name.split(".")[0] in ("tests", "examples", "plugins", "scripts")}
            assert wrong == set(), path


def test_no_cycles_between_modules(sources):
    """At import time: what is imported within a function does not count."""
    graph = {}
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    for module, path in names.items():
        if module.startswith("miles."):
            found = set()
            for node in ast.parse(sources[path]).body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
            graph[module] = {name for name in found if name in names and name.startswith("miles.") and name != module}
    done = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                if not module.startswith(f"{other}."):
                    visit(other, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize(
    "source", ["import miles", "import miles.cli", "import miles.builtins.plugin", "import miles.api"]
)
def test_light_modules_load_no_torch(source):
    program = f"{source}; import sys; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
