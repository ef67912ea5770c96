"""`miles new-plugin KIND NAME`: the package of a new plugin, working and tested.

What is written comes from `miles/templates/plugin/`: `package.txt` holds the files of every plugin, `<kind>.txt` those
of one kind. A line `=== path` begins a file; `$package` and the other fields of `Names` are filled in, in paths and
texts alike, by `string.Template`. The section `about` is no file: its first line says in a few words what the
component does, the rest is for the README.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from miles import __version__
from miles.catalog import PROVIDERS
from miles.cli import Call
from miles.cli.kinds import NAMES, kind_called
from miles.config.leaves import leaves
from miles.errors import ConfigError, PluginConflictError
from miles.kinds import Kind
from miles.plugins import load_plugins
from miles.registry import Registry

HELP = f"""usage: miles new-plugin KIND NAME [--dir DIR]

Writes a package miles-NAME into DIR (here, unless you say otherwise): a small component of that kind that works, with
an option, tests and a README, ready to be changed into yours. Nothing that exists is overwritten.

kinds: {NAMES}"""

LONGEST = 32
"""Characters of a name: longer ones would push lines of what is written beyond 120 columns."""
TRIED_ON_LLAMA = ("train_backends", "rollout_engines", "weight_syncs")
"""Kinds whose contract needs a model, and so a bridge."""


@dataclass(frozen=True)
class Names:
    """What one plugin is called in each place, and what templates may refer to."""

    name: str
    """In a config: `guess_number`."""
    Name: str
    """In classes: `GuessNumber`."""
    flag: str
    """In flags: `guess-number`."""
    dist: str
    """On an index and as a folder: `miles-guess-number`."""
    package: str
    """In imports: `miles_guess_number`."""
    kind: str
    singular: str
    usage: str
    """A command that uses it."""
    test_needs: str
    """What its tests need, as TOML strings."""
    miles_version: str = __version__

    @classmethod
    def of(cls, kind: Kind, word: str) -> Names:
        """Raises ConfigError when `word` cannot name a package."""
        bare = re.sub(r"^miles[-_]", "", word).replace("-", "_")
        classname = "".join(part.capitalize() for part in bare.split("_"))
        if keyword.iskeyword(bare):
            remedy = f"choose another name, such as '{bare}-{kind.word}'"
            raise ConfigError(f"{word!r} is a word of the Python language and cannot name a plugin; {remedy}")
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", bare):
            raise ConfigError(
                f"{word!r} cannot name a plugin; use lower-case letters, digits and single hyphens, beginning with a "
                "letter, such as 'guess-number'"
            )
        if len(bare) > LONGEST:
            raise ConfigError(f"{word!r} is {len(bare)} characters long; a plugin's name has at most {LONGEST}")
        hyphens = bare.replace("_", "-")
        needs = ["pytest", "miles-llama"] if kind.name in TRIED_ON_LLAMA else ["pytest"]
        return cls(
            name=bare,
            Name=classname,
            flag=hyphens,
            dist=f"miles-{hyphens}",
            package=f"miles_{bare}",
            kind=kind.name,
            singular=kind.singular,
            usage=f"miles train config.yaml {flag_of(kind)} {bare}",
            test_needs=", ".join(f'"{need}"' for need in needs),
        )


def run(call: Call) -> int:
    """Write the package; says what to do next."""
    if call.help:
        print(HELP)
        return 0
    parent = Path(call.take_value("--dir") or ".")
    unknown = [word for word in call.words if word.startswith("-")]
    if unknown or len(call.words) != 2:
        problem = f"does not take {unknown[0]!r}" if unknown else "takes a kind and a name"
        raise ConfigError(f"miles new-plugin {problem}: miles new-plugin KIND NAME [--dir DIR]; see --help")
    kind = kind_called(call.words[0])
    names = Names.of(kind, call.words[1])
    check_free(kind, names, Registry(load_plugins(block=call.blocked, strict=False)))
    folder = write(parent, names)
    path = folder if folder.is_absolute() else f"./{folder}"  # pip would take a bare name for one on an index
    print(f"wrote {folder}: the {names.singular} {names.name!r}. Next:\n")
    print(f'  pip install -e "{path}[test]"')
    print(f"  pytest {path}")
    print(f"  {names.usage}")
    if importlib.util.find_spec(names.name):
        print(f"\nThere is a module {names.name}, too. It is not hidden: yours is imported as {names.package}.")
    return 0


def flag_of(kind: Kind) -> str:
    """The flag that names a component of this kind: `--rm-type`."""
    [leaf] = [leaf for leaf in leaves().values() if leaf.dotted == kind.keys[0]]
    return leaf.flags[0]


def check_free(kind: Kind, names: Names, registry: Registry) -> None:
    """Make sure that nothing is called like this already.

    Raises:
        PluginConflictError: a component, a plugin, a distribution or a module is.
    """
    known = {info.name: info for info in registry.plugins.infos.values()}
    claims = [str(offer.plugin) for offer in registry.offers(kind.name) if offer.name == names.name]
    if names.name in kind.words:
        taken = f"{names.name!r} means something else as a {kind.singular}: see docs/hooks.md"
    elif claims:
        taken = f"the {kind.singular} {names.name!r} is that of {' and '.join(claims)}"
    elif names.name in known:
        taken = f"there is {known[names.name]} already"
    elif any(names.dist in offers for offers in PROVIDERS.values()):
        taken = f"{names.dist} is a plugin of miles itself"
    elif _installed(names.dist):
        taken = f"{names.dist} {_installed(names.dist)} is installed"
    elif importlib.util.find_spec(names.package):
        taken = f"there is a module {names.package} already"
    else:
        return
    raise PluginConflictError(f"{taken}; choose another name")


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def write(parent: Path, names: Names) -> Path:
    """The package's folder, with everything in it.

    Raises:
        ConfigError: there is something of this name, or it cannot be written.
    """
    folder = parent / names.dist
    if folder.exists():
        raise ConfigError(f"{folder} exists already; move it away, or choose another name or --dir")
    try:
        for path, text in package_files(names).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}; choose a folder with --dir") from error
    return folder


def package_files(names: Names) -> dict[str, str]:
    """Path within the package -> text, of every file of a new plugin."""
    own = read_template(names.kind)
    summary, _, details = own.pop("about").partition("\n")
    modules = [Path(path).stem for path in own if path.startswith("$package/")]
    words = {**asdict(names), "summary": summary, "module": modules[-1]}
    words["details"] = Template(details).substitute(words)
    every = read_template("package") | own
    return {Template(path).substitute(words): Template(text).substitute(words) for path, text in every.items()}


def read_template(name: str) -> dict[str, str]:
    """Section -> text of `miles/templates/plugin/<name>.txt`, blank lines around it cut off."""
    text = (files("miles") / "templates" / "plugin" / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^=== (\S+)\n", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    return {path: body.strip("\n") + "\n" if body.strip() else "" for path, body in sections.items()}
