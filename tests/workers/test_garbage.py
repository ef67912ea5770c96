"""Python's garbage collector, told that a process has been built."""

import gc

from miles.workers.garbage import settle, unsettle


def collections():
    return sum(generation["collections"] for generation in gc.get_stats())


def test_short_lived_lists_do_not_call_the_collector_until_what_was_built_is_let_go():
    usual = gc.get_threshold()
    settle()
    try:
        assert gc.get_freeze_count() > 0
        before = collections()
        for _ in range(20):
            [[token] for token in range(1024)]
        assert collections() == before
    finally:
        unsettle()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() == 0
    for _ in range(20):
        [[token] for token in range(1024)]
    assert collections() > before
