"""The engines keep the contract of their kind."""

import pytest

from miles.testing import RolloutEngineContract

pytest.skip("needs a server that speaks SGLang's API", allow_module_level=True)


class TestSGLang(RolloutEngineContract):
    name = "sglang"


class TestExternal(RolloutEngineContract):
    name = "sglang_external"
