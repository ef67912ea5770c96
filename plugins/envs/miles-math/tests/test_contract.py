"""The rewards keep the contract of their kind."""

from miles.testing import RewardContract


class TestExactMatch(RewardContract):
    name = "exact_match"
    cases = [("42", "42", 1.0), (" 42\n", "42", 1.0), ("43", "42", 0.0)]
    bad_options = [{"pattern": "("}]


class TestMath(RewardContract):
    name = "math"
    options = {"timeout": 2.0}
    cases = [("so \\boxed{84/2}", "42", 1.0), ("\\boxed{43}", "42", 0.0)]
    bad_options = [{"timeout": 0.0}, {"workers": 0}]
