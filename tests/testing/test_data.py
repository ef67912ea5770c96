"""Data sources that are wrong in one way each."""

import random

from miles.builtins.files import FileSource
from miles.testing import DataSourceContract


class Wrapped:
    """The built-in source with one method replaced."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)


class Untokenised(Wrapped):
    def next_prompts(self, count):
        prompts = self.source.next_prompts(count)
        for prompt in prompts:
            prompt.tokens = None
        return prompts


class Stopping(Wrapped):
    drawn = 0

    def next_prompts(self, count):
        left = len(self) - self.drawn
        self.drawn += min(count, left)
        return self.source.next_prompts(min(count, left))


class WithReplacement(Wrapped):
    def next_prompts(self, count):
        prompts = self.source.every_prompt()
        return random.Random(0).choices(prompts, k=count) if count else []


class Renumbering(Wrapped):
    drawn = 0

    def next_prompts(self, count):
        prompts = self.source.next_prompts(count)
        for prompt in prompts:
            prompt.id = f"contract:{self.drawn}"
            self.drawn += 1
        return prompts


class Unseeded(Wrapped):
    def next_prompts(self, count):
        return random.sample(prompts := self.source.next_prompts(count), len(prompts))


class Forgetful(Wrapped):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class EpochOnly(Wrapped):
    """Goes on at the start of the epoch that it was in."""

    def load_state_dict(self, state):
        self.source.load_state_dict({name: {**rows, "position": 0} for name, rows in state.items()})


class Drawing(Wrapped):
    def every_prompt(self):
        return self.source.next_prompts(len(self))


class Unlimited(Wrapped):
    def __init__(self, source):
        super().__init__(source)
        for rows in source.sets:
            object.__setattr__(rows.context, "max_prompt_tokens", None)


class Wordy(Wrapped):
    counts = {"too_long": "none"}


class Empty(Wrapped):
    def __len__(self):
        return 0


def wrong(wrapper):
    def build(self, **options):
        return wrapper(FileSource(context=self.context()))

    return lambda: None, {"build": build}


def test_the_built_in_one_passes(passes):
    passes(DataSourceContract, *wrong(lambda source: source)[:1], build=wrong(lambda source: source)[1]["build"])


def test_wrong_ones_are_caught(catches):
    catches(
        DataSourceContract,
        {
            "test_it_is_what_its_kind_asks_for": [wrong(Empty)],
            "test_prompts_are_ready_to_be_sampled": [wrong(Untokenised)],
            "test_as_many_as_were_asked_for": [wrong(Stopping)],
            "test_an_epoch_has_every_prompt_once": [wrong(WithReplacement), wrong(Renumbering)],
            "test_ids_are_stable": [wrong(Renumbering)],
            "test_the_seed_decides_the_order": [wrong(Unseeded)],
            "test_a_resumed_source_goes_on": [wrong(Forgetful), wrong(EpochOnly)],
            "test_evaluation_sees_every_prompt": [wrong(Drawing)],
            "test_prompts_that_are_too_long_are_dropped": [wrong(Unlimited)],
            "test_counts_are_numbers": [wrong(Wordy)],
        },
    )
