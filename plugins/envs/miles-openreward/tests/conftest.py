import importlib
import os
import sys
from pathlib import Path

os.environ["OPENREWARD_LOG_LEVEL"] = "CRITICAL"  # before the SDK is imported: it breaks on purpose here

import pytest

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="session")
def worlds():
    """The module `worlds` beside this file."""
    sys.path.insert(0, HERE)
    try:
        yield importlib.import_module("worlds")
    finally:
        sys.path.remove(HERE)
        sys.modules.pop("worlds", None)


@pytest.fixture(scope="session")
def url(worlds):
    """Where all environments of `worlds.py` are served."""
    with worlds.served(worlds.worlds()) as address:
        yield address


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    """Nobody's key, and nobody's address."""
    for name in ("OPENREWARD_API_KEY", "OPENREWARD_URL", "OPENREWARD_API_URL", "OPENREWARD_SESSION_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nobody_left(worlds):
    """Each session that a test opens is closed when it ends."""
    assert not worlds.OPEN
    yield
    assert not worlds.OPEN
