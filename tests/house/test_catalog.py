"""The table of who provides what agrees with what the repository's plugins register."""

import tomllib

from miles.catalog import MADE, PROVIDERS, provider
from miles.kinds import KINDS
from miles.plugins import load_plugins


def test_installed_plugins_of_ours_stand_in_the_table(root):
    ours = {tomllib.loads(path.read_text())["project"]["name"] for path in root.glob("plugins/*/*/pyproject.toml")}
    wrong = [
        f"{offer.kind} {offer.name}: {offer.plugin.distribution}, the table says {provider(offer.kind, offer.name)}"
        for offer in load_plugins(strict=False).registrations
        if offer.plugin.distribution in ours and provider(offer.kind, offer.name) != offer.plugin.distribution
    ]
    assert wrong == []


def test_the_table_is_well_formed():
    for kind, distributions in PROVIDERS.items():
        assert kind in KINDS
        names = [name for those in distributions.values() for name in those]
        assert len(names) == len(set(names)), kind
        assert all(distribution.startswith("miles-") for distribution in distributions)


def test_what_is_said_to_be_made_is_there_and_the_rest_is_not(root):
    ours = {tomllib.loads(path.read_text())["project"]["name"] for path in root.glob("plugins/*/*/pyproject.toml")}
    named = {distribution for distributions in PROVIDERS.values() for distribution in distributions}
    assert named & ours == MADE
