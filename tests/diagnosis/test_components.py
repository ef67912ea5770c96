"""`miles plugins doctor` finds every fault, not the first."""

import types

from miles.api import Component, hookimpl
from miles.builtins.options import PpoClipOptions
from miles.diagnosis.components import diagnose
from miles.plugins import load_plugins


class Ill(types.SimpleNamespace):
    __name__ = "ill"

    @hookimpl
    def miles_register_rewards(self):
        return {
            "no_module": Component("no_such_module_at_all:f"),
            "no_attribute": Component("json:dumpz"),
            "strange_options": Component("json:dumps", options=int),
            "taken_flag": Component("json:dumps", options=PpoClipOptions, flags={"--lr": "eps"}),
            "no_option": Component("json:dumps", options=PpoClipOptions, flags={"--my-flag": "epz"}),
            "environment": Component("json:dumps"),
        }

    @hookimpl
    def miles_register_presets(self):
        return {"crooked": {"algorithm": {"kl_los_coef": 1}}}


def test_every_fault_is_found():
    report = "\n".join(diagnose(load_plugins(extra=[Ill()])))
    for words in (
        "cannot import no_such_module_at_all",
        "json has no attribute 'dumpz'; did you mean 'dump'?",
        "declares options but is no dataclass",
        "--lr is already that of optimizer.lr",
        "'epz', which is none of its options",
        "the reward 'environment' is claimed by plugin 'builtin' of miles",
        "did you mean algorithm.kl_loss_coef?",
    ):
        assert words in report, words
