"""The comparison after a weight sync, with trainer and engine that compute log-probabilities of their own."""

import asyncio

import numpy as np
import pytest

from miles.errors import WeightSyncError
from miles.training.probe import LENGTH, SEQUENCES, WeightProbe


class Engine:
    def __init__(self, shift=0.0, max_len=10_000):
        self.shift, self.max_len = shift, max_len

    async def score(self, tokens, temperature=1.0):
        assert len(tokens) <= self.max_len
        return np.log1p(np.asarray(tokens, np.float32)) / temperature + self.shift


class Workers:
    async def call(self, method, role, tables, want):
        assert (method, role, want) == ("forward", "actor", ("log_probs",))
        return [[{"log_probs": [np.log1p(t.astype(np.float32)) / 2 for t in table.tokens]} for table in tables]]


def probed(probe, *engines):
    async def compare():
        return await probe.compare(await probe.trainer(Workers()), engines, version=4)

    return asyncio.run(compare())


def test_the_worst_engine_counts():
    probe = WeightProbe(vocab_size=50, tolerance=0.3, temperature=2.0)
    assert probed(probe, Engine()) == 0.0
    assert probed(probe, Engine(0.1), Engine(-0.25)) == pytest.approx(0.25)
    with pytest.raises(WeightSyncError, match=r"version 4, engine 1 and trainer disagree.*0\.5.*0\.3 is tolerated"):
        probed(probe, Engine(), Engine(0.5))


def test_numbers_that_are_none_are_a_disagreement():
    with pytest.raises(WeightSyncError, match="nan"):
        probed(WeightProbe(50, 1.0, 2.0), Engine(float("nan")))


@pytest.mark.parametrize(("max_length", "length"), [(None, LENGTH), (10_000, LENGTH), (20, 20)])
def test_sequences_are_no_longer_than_model_and_engine_take(max_length, length):
    probe = WeightProbe(50, 0.1, 2.0, max_length)
    assert np.stack(probe.table.tokens).shape == (SEQUENCES, length)
    assert probed(probe, Engine(max_len=length)) == 0.0
