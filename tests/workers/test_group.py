"""What the driver makes of the answers, failures and silence of several ranks."""

import asyncio

import pytest

from miles.errors import ConfigError, WorkerError
from miles.toolkit import DirectLink, Failure, WorkerFailure, WorkerHost, Workers, raised
from miles.workers import group as module

IN_COLLECTIVE = """thread miles-compute_0:
  File "/home/me/train.py", line 7, in step
    dist.all_reduce(total)
  File "/venv/torch/distributed/c10d_logger.py", line 83, in wrapper
    return func(*args, **kwargs)
  File "/venv/torch/distributed/distributed_c10d.py", line 3252, in all_reduce
    work.wait()

thread other:
  File "/home/me/elsewhere.py", line 1, in watch
    wait()
"""
IN_OWN_CODE = """thread miles-compute_0:
  File "/venv/torch/distributed/checkpoint_wrapper.py", line 9, in forward
    return self.module(x)
  File "/venv/torch/nn/modules/module.py", line 1, in _call_impl
    return self.forward(x)
  File "/home/me/train.py", line 11, in forward
    self.mix(x)
  File "/home/me/train.py", line 20, in mix
    while True: pass
"""


class FakeLink:
    """Answers what it is told to: a value, an exception to raise, or nothing (None), `after` so many seconds."""

    def __init__(self, answer=None, after=0.0, stacks="thread miles-compute_0:\n", pulse=True):
        self.answer, self.after, self.stacks, self.pulse, self.asked, self.ended = answer, after, stacks, pulse, [], []

    async def request(self, method, *args):
        self.asked.append((method, *args))
        if method == "stacks" and self.stacks is not None:
            return self.stacks
        if method == "drop" or (method == "pulse" and self.pulse):
            return None
        await asyncio.sleep(self.after)
        if self.answer is None or method in ("stacks", "pulse"):
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def stop(self):
        self.ended.append("stopped")

    def kill(self):
        self.ended.append("killed")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)


def failing(rank, error):
    return WorkerFailure(raised(rank, error))


def died(rank, text="killed by SIGKILL"):
    return WorkerFailure(Failure(rank, "died", text))


def workers(*links, timeout=None):
    return Workers("train", links, address="here", timeout=timeout)


def called(group, method="step"):
    """The error that a call ends with, and its message."""
    with pytest.raises(Exception) as caught:
        asyncio.run(group.call(method))
    return caught.value, str(caught.value)


def test_answers_come_in_the_order_of_ranks():
    group = workers(FakeLink("a", after=0.03), FakeLink("b"))
    assert asyncio.run(group.call("step", 1, x=2)) == ["a", "b"]
    assert [link.asked for link in group.links] == [[("call", "0", "step", (1,), {"x": 2})]] * 2


def test_a_failure_that_nobody_waits_for_leaves_the_group_as_it_is():
    group = workers(FakeLink("a"), FakeLink(failing(1, ZeroDivisionError("one"))))
    error, text = called(group)
    assert type(error) is WorkerError
    assert text.startswith("train rank 1 failed in step:\n")
    assert text.endswith("ZeroDivisionError: one")
    assert [link.ended for link in group.links] == [[], []]
    assert asyncio.run(group.call_one(0, "step")) == "a"


def test_ranks_that_wait_for_a_failed_one_are_ended_and_say_where_they_stood():
    group = workers(FakeLink(stacks=IN_COLLECTIVE), FakeLink(failing(1, ZeroDivisionError("one"))))
    lines = called(group)[1].splitlines()
    assert lines[0] == "train rank 1 failed in step:"
    assert lines[-2] == "ZeroDivisionError: one"
    consequence = "then train rank 0: was waiting when it was ended, in all_reduce ("
    assert lines[-1] == consequence + "/venv/torch/distributed/distributed_c10d.py:3252)"
    assert [link.ended for link in group.links] == [["killed"], ["killed"]]


def test_later_calls_say_that_the_group_has_ended_and_why():
    group = workers(FakeLink("a"), FakeLink(died(1)))
    called(group)
    for call in (group.call("more"), group.call_each("more", [(), ()]), group.call_one(0, "more")):
        with pytest.raises(WorkerError) as caught:
            asyncio.run(call)
        assert str(caught.value) == "the train workers have ended: train rank 1 died in step: killed by SIGKILL"
    assert [len(link.asked) for link in group.links] == [1, 1]


def test_a_death_comes_before_what_it_led_to():
    group = workers(FakeLink(failing(0, RuntimeError("connection reset"))), FakeLink(died(1), after=0.02))
    text = called(group)[1]
    assert text.startswith("train rank 1 died in step:\nkilled by SIGKILL\n")
    assert text.endswith("then train rank 0: RuntimeError: connection reset")


def test_of_two_that_raise_the_earlier_one_leads():
    first, second = failing(1, ValueError("first")), failing(0, ValueError("second"))
    text = called(workers(FakeLink(second, after=0.03), FakeLink(first)))[1]
    assert text.startswith("train rank 1 failed")
    assert text.endswith("then train rank 0: ValueError: second")


def test_an_error_of_miles_is_raised_as_it_is():
    error, text = called(workers(FakeLink("a"), FakeLink(failing(1, ConfigError("no such thing")))))
    assert type(error) is ConfigError
    assert text == "no such thing"
    assert error.__notes__ == ["raised by train rank 1 in step"]


def test_of_silent_ranks_the_one_outside_of_collectives_leads():
    group = workers(FakeLink(stacks=IN_COLLECTIVE), FakeLink(stacks=IN_OWN_CODE), timeout=0.05)
    lines = called(group)[1].splitlines()
    assert lines[0] == "train rank 1 does not answer in step:"
    assert "    while True: pass" in lines
    assert lines[-2] == "no answer in 0.05 s, in mix (/home/me/train.py:20)"
    assert lines[-1].startswith("then train rank 0: no answer in 0.05 s, in all_reduce (")
    assert [link.ended for link in group.links] == [["killed"], ["killed"]]


def test_a_rank_that_cannot_even_say_where_it_stands():
    text = called(workers(FakeLink(stacks=None), timeout=0.05))[1]
    assert text == "train rank 0 does not answer in step:\nnor does it say where it stands\nno answer in 0.05 s"


def test_an_answer_that_comes_while_its_rank_is_asked_where_it_stands_counts():
    """After the machine was suspended, for example."""
    group = workers(FakeLink("late", after=0.1, stacks=None), timeout=0.05)
    assert asyncio.run(group.call("step")) == ["late"]


def test_building_has_a_time_limit_of_its_own():
    group = workers(FakeLink("built", after=0.2), timeout=0.05)
    assert asyncio.run(Workers.build(group, "module:Class", (), {})) is group


def test_an_argument_that_cannot_be_sent_is_the_drivers_own_error():
    group = workers(FakeLink(TypeError("cannot pickle a lock")), FakeLink())
    assert type(called(group)[0]) is TypeError
    assert [link.ended for link in group.links] == [["killed"], ["killed"]]


def test_a_call_that_is_given_up_leaves_the_group_as_it_is():
    group = workers(FakeLink("a", after=0.05), FakeLink("b", after=0.05))

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.call("step"), 0.01)
        return await group.call("step")

    assert asyncio.run(main()) == ["a", "b"]
    assert [link.ended for link in group.links] == [[], []]


def test_one_rank_alone_takes_its_time_and_ends_nobody():
    group = workers(FakeLink("a"), FakeLink(failing(1, ValueError("one"))), FakeLink("c", after=0.1), timeout=0.02)
    assert asyncio.run(group.call_one(2, "generate")) == "c"
    assert group.links[0].asked[0] == group.links[2].asked[1] == ("pulse",)
    with pytest.raises(WorkerError, match="train rank 1 failed in generate"):
        asyncio.run(group.call_one(1, "generate"))
    assert [link.ended for link in group.links] == [[], [], []]


def test_one_rank_alone_that_fails_because_another_died_names_that_one():
    gone = FakeLink()
    group = workers(FakeLink(failing(0, RuntimeError("connection reset"))), gone)

    async def request(method, *args):
        await asyncio.sleep(0.03)
        raise died(1)

    gone.request = request
    with pytest.raises(WorkerError) as caught:
        asyncio.run(group.call_one(0, "receive"))
    assert str(caught.value).splitlines() == [
        "train rank 1 died in receive:",
        "killed by SIGKILL",
        "then train rank 0: RuntimeError: connection reset",
    ]


def test_one_rank_alone_is_waited_for_as_long_as_all_have_a_pulse():
    group = workers(FakeLink(), FakeLink(stacks=IN_OWN_CODE, pulse=False), timeout=0.05)
    with pytest.raises(WorkerError) as caught:
        asyncio.run(group.call_one(0, "generate"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "train rank 1 does not answer in generate:"
    assert lines[-1] == "no answer in 0.05 s, in mix (/home/me/train.py:20)"
    assert [link.ended for link in group.links] == [["killed"], ["killed"]]


def test_calls_of_one_rank_alone_share_their_pulses():
    links = [FakeLink(after=0.2), FakeLink(0, after=0.2), FakeLink(1, after=0.2)]
    group = workers(*links, timeout=0.4)  # a pulse each 0.04 s

    async def main():
        ten = [group.call_one(1 + i % 2, "generate") for i in range(10)]
        assert await asyncio.gather(*ten) == [0, 1] * 5
        return len(links[0].asked)

    pulses = asyncio.run(main())
    assert links[0].asked == [("pulse",)] * pulses
    assert 1 <= pulses <= 10
    asyncio.run(asyncio.sleep(0.1))
    assert len(links[0].asked) == pulses  # nobody waits any more


def test_a_process_that_stands_still_is_found_by_all_who_wait():
    group = workers(FakeLink(), FakeLink(), FakeLink(stacks=IN_OWN_CODE, pulse=False), timeout=0.05)

    async def main():
        return await asyncio.gather(*(group.call_one(rank, "generate") for rank in (0, 1, 1)), return_exceptions=True)

    errors = asyncio.run(main())
    assert [type(error) for error in errors] == [WorkerError] * 3
    assert {str(error).splitlines()[0] for error in errors} == {"train rank 2 does not answer in generate:"}
    with pytest.raises(WorkerError, match="^the train workers have ended: train rank 2 does not answer in generate"):
        asyncio.run(group.call_one(0, "generate"))


def test_groups_in_the_same_processes_end_together():
    links = FakeLink("a"), FakeLink("b")
    train = workers(*links)
    engines = asyncio.run(train.beside("rollout", "module:Engine", 1, x=2))
    assert links[0].asked == [("build", "0.1", "module:Engine", (1,), {"x": 2})]
    asyncio.run(engines.close())
    assert links[0].asked[-1] == ("drop", "0.1")
    links[1].answer = died(1)
    called(train)
    with pytest.raises(
        WorkerError, match="^the rollout workers have ended: train rank 1 died in step: killed by SIGKILL$"
    ):
        asyncio.run(engines.call("pause"))
    asyncio.run(train.close())
    assert links[0].ended == ["killed", "stopped"]


def test_closing_a_group_beside_does_not_wait_for_a_process_that_hangs():
    hanging = FakeLink("a")
    engines = asyncio.run(workers(hanging, FakeLink("b")).beside("rollout", "module:Engine"))
    hanging.request = lambda *call: asyncio.sleep(60)
    asyncio.run(asyncio.wait_for(engines.close(), 5))


def test_a_call_under_way_while_another_group_ends_the_processes():
    links = FakeLink(died(0, "ended by the driver"), after=0.1), FakeLink(died(1, "ended by the driver"), after=0.1)
    train = workers(*links)

    async def main():
        engines = Workers("rollout", links, address="here", timeout=None, key="0.1", fate=train._fate)
        under_way = asyncio.ensure_future(engines.call("wake"))
        await asyncio.sleep(0.01)
        train._fate.end = "train rank 1 failed in step: ZeroDivisionError"
        await under_way

    with pytest.raises(WorkerError, match="^the rollout workers have ended: train rank 1 failed in step: ZeroDiv"):
        asyncio.run(main())


def test_errors_of_the_drivers_own_process_arrive_as_they_were_raised():
    async def main():
        group = await Workers.build(
            Workers("train", [DirectLink(WorkerHost(0, 1))], address="here", timeout=None), "builtins:range", (7,), {}
        )
        await group.call("index", 9)

    with pytest.raises(ValueError, match="9 is not in range"):
        asyncio.run(main())
