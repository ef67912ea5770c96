"""Golden values of one step on `onestep.golden_batch()`: loss, norm of the gradient, the gradient's first entry; and
advantages.

Each was computed in float64 by the first of the programs that it names, and the others agree with it to 1e-7: the tests
in peers/ compute all of them again.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

VERL, TRL, AREAL = "verl 0.9.1", "trl 1.16.0", "areal 1.0.4"


@dataclass(frozen=True)
class Golden:
    """A step with these settings of the section `algorithm`."""

    numbers: tuple[float, float, float]
    of: tuple[str, ...]
    algorithm: dict[str, Any]


def row(numbers: tuple[float, float, float], *of: str, **algorithm: Any) -> Golden:
    """Averaged over tokens and with PPO's loss if not said otherwise."""
    return Golden(numbers, of, {"policy_loss": PPO, "loss_aggregation": "token_mean", **algorithm})


def peer(module: str) -> Any:
    """A module of another program; where that is not installed, the test module that asks is skipped."""
    program, where = module.partition(".")[0], "scripts/peers/install.sh algorithms makes .peers/algorithms"
    return pytest.importorskip(module, reason=f"no {program} here: {where}, where test_peers.py runs this")


def assert_same(step: Any, loss: float, gradient_BS: Any) -> None:
    """A step of miles, in float32, and what another program says of it in float64."""
    torch.testing.assert_close(torch.tensor(step.loss), torch.tensor(loss), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(step.gradient_BS.double(), gradient_BS, atol=5e-7, rtol=1e-4)


BOUNDS = {"eps": 0.2, "eps_high": 0.28}
PPO = {"name": "ppo_clip", **BOUNDS}
GSPO = {"name": "gspo", **BOUNDS}
CISPO = {"name": "cispo", **BOUNDS}
PAPER_CISPO = {"name": "cispo", "eps": None, "eps_high": 0.28}
SAPO = {"name": "sapo", "tau_pos": 1.0, "tau_neg": 1.05}
DPPO = {"name": "dppo_tv", "delta": 0.2, "delta_high": 0.28, "truncation": 20.0}
TIS = {"name": "tis", "high": 2.0}
ICEPOP = {"name": "icepop", "low": 0.8, "high": 1.25}
SEQUENCE_TIS = {
    "name": "mis",
    "level": "sequence",
    "high": 2.0,
    "normalize": False,
    "reject_level": "none",
    "veto": None,
}
GEOMETRIC_MASK = {"name": "mis", "level": "none", "reject_level": "geometric", "veto": None}
GEOMETRIC_MASK |= {"reject_low": 0.9, "reject_high": 1.1}

STEPS = {
    "ppo_clip": row((-0.059795824, 0.053483350, -0.005020285), VERL, TRL, AREAL),
    "ppo_clip sample_mean": row((0.008554743, 0.059153973, -0.003451446), VERL, TRL, loss_aggregation="sample_mean"),
    "ppo_clip constant": row(
        (-0.041109629, 0.036769803, -0.003451446), VERL, TRL, loss_aggregation="constant", aggregation_constant=12
    ),
    "ppo_clip with KL": row((-0.015095909, 0.072717122, -0.007785619), VERL, TRL, kl_loss_coef=1.0, kl_type="k3"),
    "gspo sample_mean": row(
        (-0.006798317, 0.061394349, -0.005428997), VERL, TRL, policy_loss=GSPO, loss_aggregation="sample_mean"
    ),
    "gspo": row((-0.073283594, 0.058246173, -0.007896722), VERL, AREAL, policy_loss=GSPO),
    "cispo": row((0.079398480, 0.060028643, -0.006060606), VERL, policy_loss=CISPO),
    "cispo without a lower bound": row((0.081659237, 0.059232667, -0.005020285), TRL, policy_loss=PAPER_CISPO),
    "sapo sample_mean": row(
        (-0.026023659, 0.063622999, -0.003355096), VERL, TRL, policy_loss=SAPO, loss_aggregation="sample_mean"
    ),
    "sapo": row((-0.156729394, 0.059992088, -0.004880140), AREAL, policy_loss=SAPO),
    "dppo_tv": row((0.088972303, 0.061432617, -0.005020285), VERL, policy_loss=DPPO),
    "tis": row((-0.056205385, 0.054493026, -0.005774168), VERL, TRL, AREAL, is_correction=TIS),
    "sequence tis": row((0.016793514, 0.077793467, -0.002770831), VERL, TRL, is_correction=SEQUENCE_TIS),
    "icepop": row((-0.061516144, 0.046246617, -0.005774168), VERL, TRL, AREAL, is_correction=ICEPOP),
    "geometric mask": row((-0.051396704, 0.051262661, -0.005020285), VERL, is_correction=GEOMETRIC_MASK),
}
ADVANTAGES = {
    "grpo": (0.866023904, -0.866023904, -0.866023904, 0.866023904, 0.499999, 0.499999, 0.499999, -1.499997),
    "dr_grpo": (0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75),
    "rloo": (2 / 3, -2 / 3, -2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, -1.0),
    "reinforce_plus_plus": tuple(0.654366085 if won else -1.505041996 for won in (1, 0, 0, 1, 1, 1, 1, 0)),
    "reinforce_plus_plus_baseline": (
        *(0.917121630, -1.188270634, -1.188270634, 0.917121630),
        *(0.390773564, 0.390773564, 0.390773564, -1.714618700),
    ),
    "remax": (0.75, -0.25, -0.25, 0.75, 0.25, 0.25, 0.25, -0.75),
}
"""Of each sample's first token, by verl 0.9.1."""
