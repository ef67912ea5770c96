"""The modes: how flags and presets become settings, and which go together."""

import pytest

from miles.config.faults import ConfigFaults
from miles.config.load import resolve


def own(inputs):
    """An estimator, so that no other package must be installed."""
    return inputs.mask_T


def algorithm(*words, **given):
    overrides = {"algorithm.advantage_estimator": own, **given}
    return resolve(arguments=words, overrides=overrides, purpose="show").config.algorithm


def test_the_flags_of_slime_and_miles():
    assert algorithm("--use-tis", "--tis-clip", "3", "--tis-clip-low", "0.1").is_correction.model_dump() == {
        "name": "tis",
        "options": {"high": 3.0, "low": 0.1},
    }
    assert algorithm(use_tis=True, tis_clip=None).is_correction.options == {"high": None}
    with pytest.raises(ConfigFaults, match=r"set algorithm.is_correction to tis \(--use-tis\), or leave the flag out"):
        algorithm("--tis-clip", "3")


def test_a_level_that_is_none_is_told_all_four():
    with pytest.raises(ConfigFaults, match="must be 'token', 'sequence', 'geometric' or 'none'") as caught:
        algorithm("--is-correction", "mis", "--mis-level", "seq")
    assert [fault.key for fault in caught.value.faults] == ["algorithm.is_correction.level"]


def test_options_of_mis_by_flag():
    words = "--is-correction", "mis", "--mis-level", "none", "--mis-reject-level", "geometric", "--mis-veto", "none"
    assert algorithm(*words).is_correction.options == {"level": "none", "reject_level": "geometric", "veto": None}


def test_bypass_leaves_nothing_to_correct():
    section = algorithm("--preset", "bypass")
    assert (section.old_logprobs, section.is_correction.name) == ("rollout", "none")
    with pytest.raises(ConfigFaults, match="compares old with rollout log-probs, but old_logprobs is 'rollout'"):
        algorithm("--preset", "bypass", "--use-tis")


def test_decoupled_ppo_takes_another_correction_too():
    section = algorithm("--preset", "decoupled_ppo")
    assert (section.old_logprobs, section.policy_loss.name) == ("recompute", "ppo_clip")
    assert section.is_correction.model_dump() == {"name": "icepop", "options": {"low": None, "high": 5.0}}
    unbounded = algorithm("--preset", "decoupled_ppo", "--is-correction", "{name: tis, high: null}")
    assert unbounded.old_logprobs == "recompute"
    assert unbounded.is_correction.model_dump() == {"name": "tis", "options": {"high": None}}
