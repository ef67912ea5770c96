"""The modes: how flags and presets become settings, and which go together."""

import pytest

from miles.config.faults import ConfigFaults
from miles.config.load import resolve

MODEL = {
    "model": {"hf_checkpoint": "org/tiny"},
    "rollout": {"num_rollout": 3},
    "data": {"sets": [{"path": "train.jsonl", "reward": "exact_match"}]},
}


def algorithm(*words, files=(), **given):
    return resolve([MODEL, *files], words, overrides=given).config.algorithm


def test_the_flags_of_slime_and_miles():
    assert algorithm("--use-tis", "--tis-clip", "3", "--tis-clip-low", "0.1").is_correction.model_dump() == {
        "name": "tis",
        "options": {"high": 3.0, "low": 0.1},
    }
    assert algorithm(use_tis=True, tis_clip=None).is_correction.options == {"high": None}
    with pytest.raises(ConfigFaults, match=r"set algorithm.is_correction to tis \(--use-tis\), or leave the flag out"):
        algorithm("--tis-clip", "3")


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
