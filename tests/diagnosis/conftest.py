"""Facts of a machine where everything is as it should be, as the probe reports them."""

import copy

import pytest

PRODUCT = {"device": "cpu", "dtype": "float32", "milliseconds": 1.0, "relative_error": 1e-6}
FACTS = {
    "torch": {
        "version": "2.13.0+cpu",
        "cuda_build": None,
        "hip_build": None,
        "threads": 2,
        "cuda_available": False,
        "mps_available": False,
        "devices": [],
    },
    "compute": {
        "products": [PRODUCT, {**PRODUCT, "dtype": "bfloat16", "relative_error": 2e-3}],
        "compilers": {"c++": "/usr/bin/g++", "c": "/usr/bin/cc", "triton": None},
    },
    "transformers": {"version": "5.12.1"},
    "components": {"components": []},
}


@pytest.fixture
def facts():
    return copy.deepcopy(FACTS)
