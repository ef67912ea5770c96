"""Random plays: whatever the lengths, tools, failures, filters and stops, every rollout gets one fate."""

import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playhouse import House

from miles.rollout.saved import read_groups, write_groups
from miles.rollout.task import unfinished
from miles.types import Verdict

STEPS, BATCH, SIZE = 4, 3, 2
MODES = st.one_of(
    st.fixed_dictionaries({"mode": st.just("one_step_off")}),
    st.fixed_dictionaries(
        {
            "mode": st.just("fully_async"),
            "max_weight_staleness": st.integers(0, 3),
            "stale_groups": st.sampled_from(["wait", "drop", "retry"]),
            "pause_mode": st.sampled_from(["retract", "abort", "in_place"]),
        }
    ),
    st.fixed_dictionaries(
        {
            "partial_rollout": st.just(True),
            "over_sampling_batch_size": st.integers(BATCH, 2 * BATCH),
            "max_weight_staleness": st.sampled_from([None, 0, 1, 2]),
            "stale_groups": st.sampled_from(["wait", "drop", "retry"]),
            "mask_offpolicy_in_partial_rollout": st.booleans(),
        }
    ),
)


class Play:
    """A run that may be stopped while it fills a batch, and goes on from the boundary before."""

    def __init__(self, mode, seed, greedy, folder):
        number = lambda i, salt: (i * 2654435761 + seed * 40503 + salt * 97) >> 7 & 1023  # noqa: E731
        self.how = {
            "length": lambda i: 40 if number(i, 0) < 60 else 2 + number(i, 0) % 7,
            "tool": lambda i: 0.01 if number(i, 1) < 100 else 0.0,
            "outcome": lambda i: None if number(i, 2) < 100 else 1.0,
            "filters": [lambda group: Verdict(number(group.id, 3) > 200, "no")],
        } | {"batch_size": BATCH, "n_samples_per_prompt": SIZE, "max_failed_fraction": 1.0, **mode}
        self.greedy, self.file = greedy, folder / "held.npz"
        self.pause = (number(1, 4) % 3) / 200
        self.interval = 1 + number(2, 4) % (1 + (mode.get("max_weight_staleness") or 0))

    def house(self):
        house = House(steps=STEPS, **self.how)
        house.producer.greedy = self.greedy
        return house

    async def run(self, stop, patience):
        """Batches of all steps; the one after step `stop` is given up after so many seconds, once."""
        house, step, batches, stopped = self.house(), 0, [], False
        async with house.producer.updating(0):
            pass
        while step < STEPS:
            state, held = house.producer.state_dict(), house.producer.held()
            if step == stop and not stopped:
                stopped = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(house.producer.collect(step), patience)
                await house.producer.close()
                write_groups(self.file, held)
                house = self.house()
                house.producer.load_state_dict(state, read_groups(self.file))
                async with house.producer.updating(step):
                    house.engine.version = step
                continue
            batches.append(await asyncio.wait_for(house.producer.collect(step), 20))
            step += 1
            await house.train(step - 1, self.pause, self.interval)
        house.producer.ledger.check(house.producer._pending())
        await house.producer.close()
        return house, batches


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(MODES, st.integers(0, 999), st.booleans(), st.integers(0, STEPS - 1), st.sampled_from([0.0, 0.004, 0.012]))
def test_every_rollout_has_one_fate_and_none_is_trained_twice(mode, seed, greedy, stop, patience):
    with tempfile.TemporaryDirectory() as folder:
        house, batches = asyncio.run(Play(mode, seed, greedy, Path(folder)).run(stop, patience))
    groups = [group for batch in batches for group in batch]
    samples = [sample for group in groups for sample in group.samples]
    assert [len(batch) for batch in batches] == [BATCH] * STEPS
    assert len({group.id for group in groups}) == len(groups)
    assert len({sample.id for sample in samples}) == len(samples) == house.producer.ledger.fates["trained"]
    for step, batch in enumerate(batches):
        for group in batch:
            assert not unfinished(group)
            assert 0 < len(group.samples) <= SIZE
            assert (group.baseline is not None) == house.producer.greedy
            for sample in group.samples:
                drawn = sample.columns["weight_version"][1:]
                assert [token // 1000 for token in sample.tokens[1:]] == drawn.tolist()
                assert [token % 1000 for token in sample.tokens[1:]] == list(range(1, len(sample.tokens)))
                assert drawn.max() <= step
                if house.producer.pace.staleness is not None:
                    assert step - drawn.min() <= house.producer.pace.staleness
                if "one_step_off" in mode.values():
                    assert step - drawn.min() <= 1
