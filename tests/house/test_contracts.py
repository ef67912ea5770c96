"""Every component that a package of this repository registers is held to the contract of its kind."""

import ast
import tomllib

from miles.plugins import load_plugins
from miles.testing import CONTRACTS

KINDS_OF = {contract.__name__: kind for kind, contract in CONTRACTS.items()}


def contracts_in(sources, folder):
    """(kind, name) of each contract class in the tests below a folder, read without running them."""
    for path, text in sources.items():
        if path.startswith(f"{folder}/") and path.rpartition("/")[2].startswith("test_"):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                    kinds = [KINDS_OF[base.id] for base in node.bases if getattr(base, "id", "") in KINDS_OF]
                    names = [
                        line.value.value
                        for line in node.body
                        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "name"
                    ]
                    yield from ((kind, name) for kind in kinds for name in names)


def test_every_component_has_a_contract_class(sources, root):
    folders = {"miles": "tests/builtins"}
    for path in root.glob("plugins/*/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        if "miles" in project.get("entry-points", {}):  # and not one that brings a command alone
            folders[project["name"]] = f"{path.parent.relative_to(root).as_posix()}/tests"
    done = {distribution: set(contracts_in(sources, folder)) for distribution, folder in folders.items()}
    plugins = load_plugins(strict=False)
    ours = [offer for offer in plugins.registrations if offer.plugin.distribution in folders]
    assert {offer.plugin.distribution for offer in ours} == set(folders), "install what is not here: pip install -e"
    without = [
        f"{offer.plugin.distribution}: {offer.kind} {offer.name} has no {CONTRACTS[offer.kind].__name__} "
        f"in {folders[offer.plugin.distribution]}"
        for offer in ours
        if (offer.kind, offer.name) not in done[offer.plugin.distribution]
    ]
    assert without == []


def test_what_is_read():
    source = (
        "class TestA(RewardContract):\n    name = 'a'\nclass TestB(RewardContract):\n    pass\n"
        "class C(RewardContract):\n    name = 'c'\n"
    )
    files = {"plugins/x/tests/test_contract.py": source, "plugins/y/tests/test_contract.py": source}
    assert list(contracts_in(files, "plugins/x/tests")) == [("rewards", "a")]
