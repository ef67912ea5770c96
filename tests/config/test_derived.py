"""Numbers that follow from a config, worked out by hand."""

import pytest

from miles.config import Config
from miles.config.derived import Derived, Numbers
from miles.errors import ConfigError


def config(*samples, rollout=None, **train):
    """Four prompts a batch, three samples of each unless a task set says otherwise."""
    sets = [{"name": str(i), "n_samples_per_prompt": n} for i, n in enumerate(samples)]
    rollout = {"batch_size": 4, "n_samples_per_prompt": 3, "num_rollout": 10, **(rollout or {})}
    return Config.model_validate({"data": {"sets": sets}, "rollout": rollout, "train": train})


@pytest.mark.parametrize(
    ("samples", "train", "expected"),
    [
        ((), {}, (12, 12, 1)),
        ((None,), {"num_steps_per_rollout": 2}, (12, 6, 2)),
        ((6,), {"num_steps_per_rollout": 2}, (24, 12, 2)),
        ((6, 6), {"global_batch_size": 8}, (24, 8, 3)),
        ((3, None), {"global_batch_size": 4, "num_epochs_per_rollout": 2}, (12, 4, 6)),
        ((2, 6), {"num_steps_per_rollout": 5}, (None, None, 5)),
        ((2, None), {}, (None, None, 1)),
    ],
)
def test_the_sets_say_how_many_samples_there_are(samples, train, expected):
    derived = Derived.of(config(*samples, **train))
    assert (derived.samples_per_rollout, derived.global_batch_size, derived.optimizer_steps_per_rollout) == expected
    assert derived.total_optimizer_steps == 10 * expected[2]


@pytest.mark.parametrize(
    ("samples", "train", "words"),
    [
        ((6,), {"global_batch_size": 5}, r"does not divide the 24 samples of a rollout batch \(4 prompts x 6"),
        ((6,), {"num_steps_per_rollout": 7}, "num_steps_per_rollout=7 does not divide the 24 samples"),
        ((6,), {"global_batch_size": 6, "num_steps_per_rollout": 2}, "give one of the two"),
        ((2, 6), {"global_batch_size": 8}, "draw 2, 6 of each prompt.*give train.num_steps_per_rollout instead"),
    ],
)
def test_numbers_that_do_not_fit_together(samples, train, words):
    with pytest.raises(ConfigError, match=words):
        Numbers.of(config(*samples, **train))


def test_epochs_need_the_prompts_to_be_counted():
    epochs = config(rollout={"num_rollout": None, "num_epoch": 2})
    assert Derived.of(epochs, prompts_per_epoch=9).num_rollout == 5  # 18 prompts, 4 a step
    assert Derived.of(epochs, prompts_per_epoch=0).num_rollout == 0
    with pytest.raises(ConfigError, match="num_epoch"):
        Derived.of(epochs)
