"""Every rollout that was started has one fate, or is somewhere."""

import pytest

from miles.errors import RolloutError
from miles.rollout.ledger import Ledger


def test_what_was_started_is_settled_once_or_pending():
    ledger = Ledger()
    ledger.start([0, 1, 2, -1])
    ledger.settle([0, -1], "trained")
    ledger.settle([2], "stale")
    ledger.check([1])
    ledger.remove(1)
    assert ledger.fates == {"trained": 1, "removed": 1, "stale": 1}
    ledger.check([1])


def test_a_rollout_that_vanished_is_named():
    ledger = Ledger()
    ledger.start(range(5))
    ledger.settle([0, 1], "trained")
    with pytest.raises(
        RolloutError, match=r"5 rollouts were started, 2 have met their fate and 2 are held.*nobody holds \[3\]"
    ):
        ledger.check([2, 4])
    with pytest.raises(RolloutError, match=r"\[1\] are held without being pending"):
        ledger.check([1, 2, 3, 4])


def test_no_fate_comes_twice_or_to_strangers():
    ledger = Ledger()
    ledger.start([7])
    ledger.settle([7], "failed")
    with pytest.raises(RolloutError, match=r"\[7\] are to be trained, and none of them is pending"):
        ledger.settle([7], "trained")
    with pytest.raises(RolloutError, match="in use"):
        ledger.start([8, 8])


def test_it_goes_on_in_another_process():
    ledger, later = Ledger(), Ledger()
    ledger.start([0, 1, 2])
    ledger.settle([0], "trained")
    later.load_state_dict(ledger.state_dict(), [1, 2])
    later.check([2, 1])
    later.settle([1, 2], "trained")
    assert later.fates == {"trained": 3}
