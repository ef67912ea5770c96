import math

import pytest
import torch

from miles.training.kl import kl_estimate

L = math.log(2)  # the policy is twice as likely as the reference


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", L), ("k2", L * L / 2), ("k3", 0.5 - 1 + L), ("low_var_kl", 0.5 - 1 + L)]
)
def test_by_hand(kind, expected):
    value = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 - L]), kind)
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_extreme_ratios_stay_finite():
    new, ref = torch.tensor([-60.0, -0.1]), torch.tensor([-0.1, -60.0])
    assert torch.isfinite(kl_estimate(new, ref, "k3")).all()
    assert float(kl_estimate(new, ref, "low_var_kl").max()) <= 10


def test_k3_is_unbiased():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        assert float((p * kl_estimate(p.log(), q.log(), kind)).sum()) == pytest.approx(float(expected))
