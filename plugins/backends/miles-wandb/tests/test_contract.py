"""The tracker keeps the contract of its kind."""

import pytest

from miles.testing import TrackerContract

pytest.importorskip("wandb")


class TestWandb(TrackerContract):
    name = "wandb"
    options = {"mode": "offline"}
