"""What the preset stands for, and settings that contradict the penalty."""

import pytest
from miles_dapo.plugin import miles_configure

from miles.api import ConfigError
from miles.config.load import resolve

BASE = ("--hf-checkpoint", "org/tiny", "--num-rollout", "3", "--prompt-data", "train.jsonl")


def own(sample):
    """A reward, so that no other package must be installed."""
    return 1.0


def config_of(*arguments):
    return resolve((), [*BASE, *arguments], overrides={"data.sets.default.reward": own}).config


def test_what_it_sets():
    config = config_of("--preset", "dapo")
    algorithm = config.algorithm
    assert algorithm.advantage_estimator.name == "grpo"
    assert (algorithm.policy_loss.name, algorithm.policy_loss.options) == ("ppo_clip", {"eps": 0.2, "eps_high": 0.28})
    assert algorithm.loss_aggregation == "token_mean"
    assert (algorithm.kl_coef, algorithm.kl_loss_coef) == (0, 0)
    assert [spec.name for spec in config.rollout.filters] == ["agreeing_rewards"]
    assert [(spec.name, spec.weight) for spec in config.data.reward_terms] == [("soft_overlong", 1.0)]
    assert [spec.name.rpartition(":")[2] for spec in config.data.sets[0].reward] == ["own"]


def test_it_is_selected_as_an_estimator_too():
    config = config_of("--advantage-estimator", "dapo")
    assert (config.algorithm.preset, config.algorithm.advantage_estimator.name) == ("dapo", "grpo")


def test_flags_reach_the_penalty():
    flags = ("--overlong-buffer-len", "64", "--overlong-penalty-factor", "0.5")
    (term,) = config_of("--preset", "dapo", *flags).data.reward_terms
    assert term.options == {"buffer_len": 64, "factor": 0.5}
    with pytest.raises(ConfigError, match="which is not selected\n *fix: add soft_overlong to data.reward_terms"):
        config_of(*flags)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), None),
        (("--overlong-buffer-len", "255"), None),
        (("--overlong-buffer-len", "256"), "buffer_len=256 is not less than .*max_new_tokens=256"),
        (("--overlong-max-len", "319"), None),
        (("--overlong-max-len", "320"), "begins after 256 tokens, and no response has more than .*=256"),
        (("--truncated-samples", "mask"), "truncated='mask' takes just these out"),
        (("--truncated-samples", "drop"), "truncated='drop' takes just these out"),
        (("--truncated-samples", "drop", "--overlong-max-len", "200"), None),
        (("--truncated-samples", "mask", "--data.reward_terms=[]"), None),
    ],
)
def test_what_contradicts_the_penalty_is_refused(arguments, words):
    config = config_of("--preset", "dapo", *arguments)
    if words is None:
        miles_configure(config)
        return
    with pytest.raises(ConfigError, match=f"data.sets.default: soft_overlong: .*{words}"):
        miles_configure(config)


def test_it_is_refused_wherever_a_training_set_has_it():
    sets = {"a": {"path": "a", "reward": {"miles-dapo/soft_overlong": 0.5}}}
    arguments = ("--hf-checkpoint", "org/tiny", "--num-rollout", "3", "--truncated-samples", "drop")
    with pytest.raises(ConfigError, match="data.sets.a: soft_overlong"):
        miles_configure(resolve(({"data": {"sets": sets}},), arguments).config)


def test_every_fault_is_in_one_message():
    config = config_of("--preset", "dapo", "--overlong-buffer-len", "300", "--truncated-samples", "drop")
    with pytest.raises(ConfigError) as caught:
        miles_configure(config)
    assert [line.partition(": soft_overlong: ")[0] for line in str(caught.value).splitlines()] == [
        "data.sets.default"
    ] * 2
