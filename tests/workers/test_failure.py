"""How exceptions cross to the driver."""

import pickle

import pytest

from miles.errors import ConfigError, OutOfMemoryError, RunInterrupted
from miles.toolkit import Failure, raised
from miles.workers.failure import first_cause


class Stubborn(ConfigError):
    """Cannot be made from its message alone."""

    def __init__(self, key, value):
        super().__init__(f"{key}={value}")


def fail(error):
    raise error


def caught(error):
    try:
        fail(error)
    except Exception as found:
        return raised(3, found)


@pytest.mark.parametrize("error", [ConfigError("a"), OutOfMemoryError("b")])
def test_errors_of_miles_cross_as_they_are(error):
    failure = pickle.loads(pickle.dumps(caught(error)))
    assert type(failure.error) is type(error)
    assert str(failure.error) == str(error)
    assert (failure.rank, failure.kind) == (3, "raised")


@pytest.mark.parametrize("error", [Stubborn("a", 1), RunInterrupted("c", 2), KeyError("x")])
def test_others_as_their_traceback(error):
    failure = pickle.loads(pickle.dumps(caught(error)))
    assert failure.error is None
    assert failure.last_line.endswith(f"{type(error).__name__}: {error}")
    first, *_ = (line for line in failure.text.splitlines() if line.startswith("  File"))
    assert first.endswith(", in fail"), "begins with the worker's own code"


def test_a_silent_rank_waits_for_others_only_by_its_innermost_frames():
    frames = [f'  File "/home/me/m{n}.py", line {n}, in f{n}' for n in range(3)]
    inside = '  File "/x/torch/distributed/distributed_c10d.py", line 1, in barrier'
    assert Failure(0, "silent", "\n".join([*frames, inside])).waits_for_others
    assert not Failure(0, "silent", "\n".join([inside, *frames])).waits_for_others
    assert not Failure(0, "raised", inside).waits_for_others


def test_what_is_said_of_another_rank_is_its_error_and_not_a_note_of_it():
    error = ValueError("too wide\nby far")
    error.add_note("while building something")
    found, _ = first_cause([raised(0, KeyError("first")), raised(1, error)], "train", "forward")
    assert str(found).endswith("then train rank 1: ValueError: too wide")
