"""The plain precision scheme: what it sends and what it tolerates."""

from __future__ import annotations

import pytest
import torch

from miles.api import PrecisionScheme
from miles.builtins.plain_precision import PlainPrecision

WEIGHTS = {"matrix": torch.tensor([1.00390625, 1.0]), "count": torch.tensor([3])}  # 1 + 2^-8 is not a bf16 number


def test_fp32_is_sent_as_it_is():
    scheme = PlainPrecision()
    assert isinstance(scheme, PrecisionScheme)
    scheme.configure("fsdp", {"dtype": "fp32"})
    (group,) = scheme.export([WEIGHTS])
    assert group["matrix"] is WEIGHTS["matrix"]
    assert scheme.logprob_tolerance == 1e-4
    assert scheme.engine_options() == {}


def test_bf16_is_sent_rounded_and_tolerates_more():
    scheme = PlainPrecision()
    scheme.configure("fsdp", {"dtype": "bf16"})
    (group,) = scheme.export([WEIGHTS])
    assert group["matrix"].dtype == torch.bfloat16
    assert group["matrix"].tolist() == [1.0, 1.0]
    assert torch.equal(group["count"], WEIGHTS["count"])
    assert scheme.logprob_tolerance == 0.15


@pytest.mark.parametrize("spelling", ["bfloat16", torch.bfloat16])
def test_transformers_spellings_are_understood(spelling):
    scheme = PlainPrecision()
    scheme.configure("fsdp", {"dtype": spelling})
    assert scheme.dtype == "bf16"


def test_fp64_is_sent_as_it_is():
    scheme = PlainPrecision()
    scheme.configure("fsdp", {"dtype": "torch.float64"})
    group = {"w": torch.ones(2, dtype=torch.float64)}
    assert list(scheme.export([group])) == [group]
    assert scheme.logprob_tolerance == 1e-4


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="not 'fp8'"):
        PlainPrecision().configure("fsdp", {"dtype": "fp8"})
