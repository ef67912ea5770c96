"""Groups that come and go one by one: how many are under way, what is kept of them, and an account of all."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
from playhouse import Engine, House

from miles.errors import EngineLostError, RolloutError
from miles.rollout.engines import EngineFront
from miles.rollout.gate import Gate
from miles.rollout.saved import read_groups, write_groups
from miles.rollout.stream import Going, _mask_older
from miles.rollout.task import unfinished
from miles.types import LOSS_MASK, WEIGHT_VERSION, GenerateRequest, SamplingParams, Status, Verdict


def play(house, count, **how):
    async def main():
        try:
            return await asyncio.wait_for(house.steps(count, **how), 60)
        finally:
            await house.producer.close()

    return asyncio.run(main())


def ids(batch):
    return [group.id for group in batch]


def tokens(batches):
    return [[sample.tokens for group in batch for sample in group.samples] for batch in batches]


def odd_lengths(i):
    return 3 + (i * 37) % 23


def agree(group):
    return Verdict(group.id % 3 != 1, "agree")


# ------------------------------------------------------------------------------------------------------- equal to sync


@pytest.mark.parametrize("filters", [(), (agree,)])
def test_fully_asynchronous_where_nothing_may_be_stale_is_sync(filters):
    sync = play(House(odd_lengths, filters=filters), 4)
    never_stale = play(House(odd_lengths, filters=filters, mode="fully_async", max_weight_staleness=0), 4)
    assert [ids(batch) for batch in never_stale] == [ids(batch) for batch in sync]
    assert tokens(never_stale) == tokens(sync)


@pytest.mark.parametrize("filters", [(), (agree,)])
def test_one_step_off_is_sync_with_the_weights_of_the_step_before(filters):
    sync = play(House(odd_lengths, filters=filters), 4)
    house = House(odd_lengths, filters=filters, mode="one_step_off")
    ahead = play(house, 4, seconds=0.01)
    assert [ids(batch) for batch in ahead] == [ids(batch) for batch in sync]
    drawn = [{int(s.columns["weight_version"][-1]) for group in batch for s in group.samples} for batch in ahead]
    assert drawn == [{0}, {0}, {1}, {2}]
    assert house.producer.metrics()["rollout/staleness/max"] == 1.0
    assert house.producer.metrics()["rollout/staleness/mixed_versions"] == 0.0


def test_nothing_is_started_that_nobody_trains_on():
    for mode in ("one_step_off", "fully_async"):
        house = House(odd_lengths, steps=3, mode=mode)
        play(house, 3)
        assert house.source.at == 12
        assert house.producer.ledger.pending == set()


# ----------------------------------------------------------------------------------------------------- fully async


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_more_is_under_way_than_may_be_trained(staleness):
    house = House(lambda i: 2, mode="fully_async", max_weight_staleness=staleness)
    seen = []

    def watch(group):
        producer = house.producer
        seen.append(len(producer.under_way) + len(producer.ready) + 1)
        return Verdict(True)

    house.producer.filters, house.producer.config.rollout.__dict__["filters"] = [watch], (SimpleNamespace(name="w"),)
    play(house, 6, seconds=0.02)
    assert max(seen) == 4 * (staleness + 1)
    assert house.source.at <= 4 * (6 + 1 + staleness)


def test_short_ones_overtake_a_long_one_which_goes_on_under_new_weights():
    house = House(lambda i: 60 if i < 2 else 5, mode="fully_async", max_weight_staleness=9)
    batches = play(house, 8, seconds=0.03)
    assert 0 not in ids(batches[0])
    late = next(group for batch in batches[1:] for group in batch if group.id == 0)
    versions = late.samples[0].columns["weight_version"][1:]
    assert sorted(set(versions.tolist())) == list(range(versions.max() + 1))
    assert (np.diff(versions) >= 0).all()
    drawn = np.array(late.samples[0].tokens[1:]) // 1000
    assert (drawn == versions).all()  # each token has the version that drew it


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_requests_wait_for_new_weights_in_the_way_that_was_asked_for(mode):
    house = House(lambda i: 60, mode="fully_async", max_weight_staleness=2, pause_mode=mode)
    batches = play(house, 3, seconds=0.01)
    assert house.engine.mode == mode
    for sample in (s for batch in batches for g in batch for s in g.samples):
        assert sample.status is Status.COMPLETED
        assert len(sample.turns) == 1
        positions = [token % 1000 for token in sample.tokens[1:]]
        assert positions == list(range(1, 61))  # none is missing, none comes twice
    assert house.producer.ledger.restarted == 0


def old(i):
    return 400 if i < 2 else 4


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_batch_waits_for_what_would_be_too_old_for_the_next_one(staleness):
    house = House(lambda i: 150 if i < 2 else 4, mode="fully_async", max_weight_staleness=staleness)
    batches = play(house, 5, seconds=0.01)
    assert house.producer.ledger.fates.keys() == {"trained"}
    (step,) = (step for step, batch in enumerate(batches) if 0 in ids(batch))
    assert step <= staleness
    for step, batch in enumerate(batches):
        for sample in (s for group in batch for s in group.samples):
            assert step - int(sample.columns["weight_version"][1:].min()) <= staleness


def test_newer_groups_that_came_first_leave_places_for_the_older_ones():
    """Twelve groups of the first weights, and three batches for them: none of these has a place for a newer one."""
    house = House(lambda i: 60 + i if 8 <= i < 24 else 4, mode="fully_async", max_weight_staleness=2)
    batches = play(house, 5, seconds=0.005)
    assert house.producer.ledger.fates.keys() == {"trained"}
    assert set(range(12)) == {i for batch in batches[:3] for i in ids(batch)}


@pytest.mark.parametrize("policy", ["drop", "retry"])
def test_what_is_too_old_is_dropped_and_its_prompt_perhaps_asked_again(policy):
    house = House(old, mode="fully_async", max_weight_staleness=1, stale_groups=policy, pause_mode="abort")
    batches = play(house, 4, seconds=0.02)
    assert 0 not in [i for batch in batches for i in ids(batch)]
    assert house.producer.ledger.fates["stale"] == 2
    prompts = [group.prompt.id for batch in batches for group in batch]
    again = [group.prompt.id for group in house.producer.held()]
    assert ("s:0" in prompts + again) == (policy == "retry")
    for step, batch in enumerate(batches):
        for sample in (s for group in batch for s in group.samples):
            assert step - int(sample.columns["weight_version"][1:].min()) <= 1


@pytest.mark.parametrize(("interval", "staleness"), [(2, 1), (2, 3), (3, 2)])
def test_weights_that_come_every_few_steps_waste_nothing(interval, staleness):
    house = House(odd_lengths, mode="fully_async", max_weight_staleness=staleness)
    batches = play(house, 8, seconds=0.01, interval=interval)
    assert house.producer.ledger.fates.keys() == {"trained"}
    ages = {
        step - int(sample.columns["weight_version"][1:].min())
        for step, batch in enumerate(batches) for group in batch for sample in group.samples
    }  # fmt: skip
    assert max(ages) <= staleness
    assert house.producer.metrics()["rollout/staleness/max"] in ages


class Lost(Engine):
    """Has no token of the second weights."""

    async def generate(self, request):
        if self.version == 1:
            raise EngineLostError("it is gone")
        return await super().generate(request)


def test_what_a_group_raises_ends_the_next_batch():
    house = House(lambda i: 3, mode="fully_async")
    house.gate.engines[0] = house.engine = Lost(lambda request: 3)
    with pytest.raises(EngineLostError, match="gone"):
        play(house, 3, seconds=0.02)
    assert not house.producer.under_way


def test_what_a_group_raises_is_said_even_if_others_would_fill_the_batch():
    house = House(mode="fully_async", max_weight_staleness=2)
    house.gate.engines[0] = house.engine = Lost(lambda request: 3)

    async def main():
        await house.producer.collect(0)
        await asyncio.sleep(0.1)  # all there is room for is generated
        assert len(house.producer.ready) == 8
        house.engine.version = 1
        house.producer._start(house.producer._group(*house.source.next_prompts(1)))
        await asyncio.sleep(0.02)
        try:
            await house.producer.collect(1)
        finally:
            await house.producer.close()

    with pytest.raises(EngineLostError, match="gone"):
        asyncio.run(main())


def test_evaluation_neither_queues_behind_training_nor_counts_as_it():
    engine = Engine(lambda request: 10_000 if request.startswith("train") else 4)
    gate, front = Gate([engine], 2), EngineFront([engine], 2)

    async def main():
        params = SamplingParams(max_new_tokens=100_000)
        training = [asyncio.ensure_future(gate.generate(GenerateRequest("train", [1], params))) for _ in range(5)]
        await asyncio.wait_for(front.generate(GenerateRequest("eval", [1], params)), 2)
        await gate.close()
        return sum(len(task.result().tokens) for task in training)

    drawn = asyncio.run(main())
    assert (gate.take_traffic().generated_tokens, front.take_traffic().generated_tokens) == (drawn, 4)


def test_the_time_of_an_engine_that_never_stops_is_counted_when_it_is_asked_for():
    gate = Gate([Engine(lambda request: 10_000)], 2)

    async def main():
        start = time.perf_counter()
        request = GenerateRequest("train", [1], SamplingParams(max_new_tokens=100_000))
        task = asyncio.ensure_future(gate.generate(request))
        taken = []
        for _ in range(3):
            await asyncio.sleep(0.02)
            taken.append(gate.take_traffic().seconds)
        await gate.close()
        await task
        taken.append(gate.take_traffic().seconds)
        await asyncio.sleep(0.02)
        return taken, time.perf_counter() - start, gate.take_traffic().seconds

    taken, elapsed, idle = asyncio.run(main())
    assert min(taken[:3]) >= 0.015
    assert sum(taken) <= elapsed - 0.015
    assert idle == 0


def test_too_many_failures_end_it_but_one_at_the_beginning_does_not():
    house = House(lambda i: 2 + i, mode="fully_async", outcome=lambda i: None if i < 2 else 1.0)
    batches = play(house, 2)
    assert len(batches[0]) == 4
    house = House(lambda i: 2 + i, mode="fully_async", outcome=lambda i: None if i % 3 else 1.0)
    with pytest.raises(RolloutError, match="samples failed, more than rollout.max_failed_fraction"):
        play(house, 4)


def test_filters_that_leave_nothing_end_it():
    house = House(mode="fully_async", filters=[lambda group: Verdict(False, "never")], max_filtered_batches=3)
    with pytest.raises(RolloutError, match="only 0 of 4 passed.*f0/never"):
        play(house, 1)


# -------------------------------------------------------------------------------------------------- partial rollouts


def test_half_finished_rollouts_are_kept_and_go_on_first():
    house = House(lambda i: 100 if i < 2 else 5, partial_rollout=True, over_sampling_batch_size=6)
    batches = play(house, 2)
    assert ids(batches[0]) == [1, 2, 3, 4]
    assert house.engine.aborted > 0
    assert house.source.at < 24
    first = batches[1][0] if batches[1][0].id == 0 else house.producer.parked[0]
    assert first.id == 0
    sample = first.samples[0]
    assert set(sample.columns["weight_version"][1:].tolist()) >= {0, 1}
    assert [token % 1000 for token in sample.tokens[1:]] == list(range(1, len(sample.tokens)))
    assert len(sample.turns) == 1


def test_one_that_is_busy_elsewhere_is_not_waited_for():
    house = House(lambda i: 3, partial_rollout=True, tool=lambda i: 0.3 if i == 0 else 0.0, over_sampling_batch_size=5)

    async def main():
        async with house.producer.updating(0):
            pass
        begun = asyncio.get_running_loop().time()
        batch = await house.producer.collect(0)
        took = asyncio.get_running_loop().time() - begun
        left = house.producer.held()
        await house.producer.close()
        return batch, took, left

    batch, took, left = asyncio.run(main())
    assert ids(batch) == [1, 2, 3, 4]
    assert took < 0.25
    assert [group.id for group in left] == [0]


def test_the_part_that_older_weights_drew_can_be_left_out():
    house = House(
        lambda i: 14 if i < 2 else 5,
        partial_rollout=True,
        over_sampling_batch_size=6,
        mask_offpolicy_in_partial_rollout=True,
    )
    batches = play(house, 6)
    samples = [(step, s) for step, batch in enumerate(batches) for g in batch for s in g.samples]
    mixed = [s for step, s in samples if len(set(s.columns["weight_version"][1:].tolist())) > 1]
    assert mixed
    for step, sample in samples:
        assert (sample.loss_mask[1:] == (sample.columns["weight_version"][1:] == step)).all()


@pytest.mark.parametrize(("at_once", "staleness", "stale"), [(6, 0, 2), (12, 1, 4), (12, 2, 0)])
def test_what_no_batch_has_a_place_for_is_given_up(at_once, staleness, stale):
    house = House(odd_lengths, partial_rollout=True, over_sampling_batch_size=at_once, max_weight_staleness=staleness)
    batches = play(house, 3)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    first_weights = [i for batch in batches for i in ids(batch) if i < at_once]
    assert len(first_weights) == at_once - stale
    assert (house.producer.ledger.fates["stale"] > 0) == (stale > 0)


def test_what_has_its_last_chance_goes_before_what_began_again():
    """As after a resume: the first four have no token of the old weights, the next four have ended, or are about to."""
    rollout = {"partial_rollout": True, "over_sampling_batch_size": 12, "max_weight_staleness": 1}
    house = House(lambda i: 3 if i < 8 else 6, **rollout)
    producer = house.producer
    groups = [producer._group(*house.source.next_prompts(1)) for _ in range(8)]
    for group in groups[4:]:
        for sample in group.samples:
            sample.append([1], {LOSS_MASK: 1, WEIGHT_VERSION: 0})
    producer.load_state_dict(producer.state_dict(), groups)
    (batch,) = play(house, 1, first=1)
    assert ids(batch) == [4, 5, 6, 7]


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "rollout",
    [
        {"mode": "fully_async", "max_weight_staleness": 2},
        {"mode": "one_step_off"},
        {"partial_rollout": True, "over_sampling_batch_size": 7},
    ],
)
def test_a_checkpoint_keeps_what_nobody_was_given_yet(rollout, tmp_path):
    length = lambda i: 60 if i % 5 == 0 else 4  # noqa: E731
    house = House(length, **rollout)

    async def main():
        async with house.producer.updating(0):
            pass
        given = [i for step in range(2) for i in ids(await house.producer.collect(step))]
        state, held = house.producer.state_dict(), house.producer.held()
        write_groups(tmp_path / "held.npz", held)
        await house.producer.close()
        return given, state, held

    given, state, held = asyncio.run(main())
    assert held
    later = House(length, **rollout)
    later.producer.load_state_dict(state, read_groups(tmp_path / "held.npz"))
    batches = play(later, 3, first=2)
    trained = given + [i for batch in batches for i in ids(batch)]
    assert len(set(trained)) == len(trained)
    assert {group.id for group in held} <= set(trained) | {group.id for group in later.producer.held()}
    ledger = later.producer.ledger
    assert ledger.started == ledger.fates.total() + len(ledger.pending)
    parked = [s for group in held if unfinished(group) for s in group.samples if s.response_length]
    if parked:  # it goes on from the tokens it had
        after = {s.id: s for batch in batches for group in batch for s in group.samples}
        kept = [s for s in parked if s.id in after]
        assert all(after[s.id].tokens[: len(s.tokens)] == s.tokens for s in kept)


def test_closing_leaves_nothing_behind():
    house = House(lambda i: 10_000 if i else 3, mode="fully_async")

    async def main():
        async with house.producer.updating(0):
            pass
        waiting = asyncio.ensure_future(house.producer.collect(0))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await house.producer.close()
        await asyncio.sleep(0.01)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and task is not waiting]

    assert asyncio.run(main()) == []


# ------------------------------------------------------------------------------------------------------- at the edges


def test_filters_that_leave_nothing_end_it_while_new_weights_wait_too():
    house = House(mode="one_step_off", filters=[lambda group: Verdict(group.id < 4, "late")], max_filtered_batches=3)
    with pytest.raises(RolloutError, match="only 0 of 4 passed.*f0/late"):
        play(house, 2)


def test_what_is_held_stays_as_it_was_while_it_goes_on():
    house = House(lambda i: 40 if i < 2 else 5, partial_rollout=True, over_sampling_batch_size=6)

    async def main():
        await house.producer.collect(0)
        picture = house.producer.held()
        before = [(list(s.tokens), s.status, dict(s.metadata), len(s.turns)) for g in picture for s in g.samples]
        await house.train(0)
        await house.producer.collect(1)
        await house.producer.close()
        return picture, before

    picture, before = asyncio.run(main())
    assert 0 in ids(picture)
    assert [(s.tokens, s.status, s.metadata, len(s.turns)) for g in picture for s in g.samples] == before


def test_siblings_that_wait_for_their_reward_are_held_as_the_one_they_begin_again_as():
    house = House(lambda i: 3, mode="fully_async")
    group = house.producer._group(*house.source.next_prompts(1))
    first, second = group.samples
    first.append([5])
    group.samples = [first, first.beginning(1), second]
    house.producer.under_way[object()] = Going(group, [0, 1])
    (held,) = house.producer.held()
    assert [(sample.id, sample.status, sample.tokens) for sample in held.samples] == [
        (0, Status.PENDING, [1]), (1, Status.PENDING, [1]),
    ]  # fmt: skip


def test_a_sample_without_a_token_of_any_weights_has_nothing_to_mask():
    house = House(partial_rollout=True, mask_offpolicy_in_partial_rollout=True)
    group = house.producer._group(*house.source.next_prompts(1))
    _mask_older([group], 3)
    assert group.samples[0].loss_mask.tolist() == [0]


def test_weights_that_came_in_the_middle_of_a_rollout_are_not_older():
    house = House(partial_rollout=True, mask_offpolicy_in_partial_rollout=True)
    group = house.producer._group(*house.source.next_prompts(1))
    group.samples[0].append([7, 8, 9], {LOSS_MASK: 1, WEIGHT_VERSION: [2, 3, 4]})
    _mask_older([group], 3)
    assert group.samples[0].loss_mask.tolist() == [0, 0, 1, 1]


def test_what_a_pause_aborts_goes_on_however_late_it_came():
    class Slow(Engine):
        async def pause(self, mode):
            await asyncio.sleep(0.02)
            await super().pause(mode)

    house = House(mode="fully_async")
    house.gate.engines[0] = Slow(lambda request: 10_000)

    async def main():
        pausing = asyncio.ensure_future(house.gate.pause("abort"))
        await asyncio.sleep(0.005)
        request = GenerateRequest("0.1", [1], SamplingParams(max_new_tokens=1000))
        result = await house.gate.generate(request)
        await pausing
        await house.gate.resume()
        return result

    result = asyncio.run(main())
    assert (result.finish_reason, result.interrupted) == ("abort", True)
