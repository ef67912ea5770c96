"""The components keep the contracts of their kinds, with functions written for slime and Miles."""

from miles.testing import GenerateFunctionContract, RewardContract, SampleFilterContract


class TestGenerate(GenerateFunctionContract):
    name = "slime_function"
    options = {"path": "single.generate"}
    bad_options = [{"path": "generate"}, {"path": "single.nothing"}]


class TestReward(RewardContract):
    name = "slime_function"
    options = {"path": "judges:exact"}
    cases = [("42", "42", 1.0), ("43", "42", 0.0)]
    bad_options = [{"path": "judges"}, {"path": "no_such_module.f"}]


class TestFilter(SampleFilterContract):
    name = "slime_function"
    options = {"path": "judges.disagreeing"}
    kept = [[1.0, 0.0]]
    dropped = [[1.0, 1.0]]
    bad_options = [{"path": ""}]
