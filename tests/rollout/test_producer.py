"""Full batches, in order, with every sample accounted for."""

import asyncio
from types import SimpleNamespace

import pytest

from miles.config import Config
from miles.errors import RolloutError
from miles.rollout.measure import batch_metrics
from miles.rollout.producer import NO_BASELINE, Waves, sample_seed
from miles.types import Group, Prompt, Status, Verdict


class Source:
    """Prompts 0, 1, 2 ..."""

    def __init__(self):
        self.at = 0
        self.counts = {"too_long": 3}

    def next_prompts(self, count):
        self.at += count
        return [
            Prompt(id=f"s:{i}", task_set="s", text=str(i), tokens=[1], metadata={"n": i})
            for i in range(self.at - count, self.at)
        ]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class FakeTask:
    """Rewards and fails samples as `outcome(prompt number, sample id)` says; finishes them in scrambled order. Of a
    baseline it says `greedy(prompt number)`."""

    rewards = ("r",)

    def __init__(self, outcome, greedy):
        self.outcome, self.greedy = outcome, greedy
        self.set = SimpleNamespace(n_samples_per_prompt=None)

    def environment_metrics(self):
        return {"errors": 1.0, "calls_max": 2.0}

    async def run_group(self, group, attempts, reseed):
        await asyncio.sleep(0.001 * (7 - group.id % 7))
        for sample in group.samples:
            sample.error = f"no luck with {sample.id}"
            result = self.outcome(group.prompt.metadata["n"], sample.id)
            sample.status = Status.COMPLETED if result is not None else Status.FAILED
            sample.reward = result
        if group.baseline is not None:
            result = self.greedy(group.prompt.metadata["n"])
            group.baseline.status = Status.COMPLETED if result is not None else Status.FAILED
            group.baseline.error = None if result is not None else "the world ended"
            group.baseline.reward = group.baseline_reward = result
        return group


def make(outcome, filters=(), greedy=None, **rollout):
    names = [{"name": f"f{i}"} for i in range(len(filters))]
    config = Config.model_validate(
        {"rollout": {"batch_size": 4, "n_samples_per_prompt": 2, "filters": names, **rollout}}
    )
    source = Source()
    return Waves(config, source, {"s": FakeTask(outcome, greedy)}, list(filters), greedy is not None), source


def collect(producer, step=0):
    return asyncio.run(producer.collect(step))


def agree(group):
    return Verdict(len(set(group.rewards_G)) > 1, "agree")


def test_a_batch_comes_in_the_order_of_ids():
    producer, _ = make(lambda n, i: 1.0)
    groups = collect(producer)
    assert [g.id for g in groups] == [0, 1, 2, 3]
    assert [s.id for g in groups for s in g.samples] == list(range(8))
    of_environments = {"rollout/environment/s/errors": 1.0, "perf/environment/s/calls_max": 2.0}
    told = {"rollout/samples/trained": 8.0, "rollout/failed_ratio": 0.0, "data/too_long": 3.0}
    assert producer.metrics() == told | of_environments


def test_filtered_groups_are_replaced_and_counted():
    producer, source = make(lambda n, i: float(i % 2) if n % 2 else 1.0, filters=[agree])
    groups = collect(producer)
    assert [g.prompt.metadata["n"] for g in groups] == [1, 3, 5, 7]
    assert producer.metrics()["rollout/samples/trained"] == 8
    assert producer.metrics()["rollout/samples/f0/agree"] == 2 * (source.at - 4)


def test_oversampling_counts_its_surplus():
    producer, source = make(lambda n, i: 1.0, over_sampling_batch_size=6)
    assert len(collect(producer)) == 4
    assert producer.metrics()["rollout/samples/surplus"] == 4
    assert source.at == 6


def test_a_filter_that_passes_nothing_is_an_error_that_says_so():
    producer, _ = make(lambda n, i: 1.0, filters=[agree], max_filtered_batches=3)
    with pytest.raises(RolloutError, match="12 groups.*0 of 4 passed.*f0/agree: 24 samples"):
        collect(producer)


def test_survivors_keep_their_group():
    producer, _ = make(lambda n, i: None if i == 1 else 1.0)
    groups = collect(producer)
    assert [len(g.samples) for g in groups] == [1, 2, 2, 2]
    assert producer.metrics()["rollout/samples/failed"] == 1


def test_or_the_group_is_refilled():
    producer, _ = make(lambda n, i: None if i == 1 else 1.0, incomplete_groups="refill")
    groups = collect(producer)
    assert [g.id for g in groups] == [1, 2, 3, 4]
    assert producer.metrics()["rollout/samples/incomplete_group"] == 2


def test_too_many_failures_stop_the_run_with_the_first_one():
    producer, _ = make(lambda n, i: None if i % 4 else 1.0)
    with pytest.raises(RolloutError, match="6 of 8 samples failed.*The first: sample 1 of prompt s:0"):
        collect(producer)


def test_failures_are_a_share_of_the_whole_batch_and_kept_for_people(caplog):
    producer, _ = make(lambda n, i: None if n in (1, 4) else 1.0, incomplete_groups="refill")
    groups = collect(producer)  # prompt 1 fails, and so does 4, alone in the wave that replaces it
    assert [g.prompt.metadata["n"] for g in groups] == [0, 2, 3, 5]
    assert producer.metrics()["rollout/failed_ratio"] == pytest.approx(4 / 12)
    assert [s.id for s in producer.lost] == [2, 3, 8, 9]
    assert caplog.text.count("1 sample failed: no luck with") == 4  # two in each of two waves


def test_errors_that_all_differ_are_not_all_shown(caplog):
    producer, _ = make(lambda n, i: None if i % 2 else float(i), batch_size=5)
    collect(producer)
    assert caplog.text.count("1 sample failed: no luck with") == 3
    assert caplog.text.count("... and so on: 5 different errors, all in rollouts/") == 1


def test_a_resumed_producer_goes_on_where_the_other_was():
    one, _ = make(lambda n, i: 1.0)
    collect(one)
    two, _ = make(lambda n, i: 1.0)
    two.load_state_dict(one.state_dict())
    first, second = collect(one), collect(two)
    assert [(s.id, s.seed, s.prompt.id) for g in first for s in g.samples] == [
        (s.id, s.seed, s.prompt.id) for g in second for s in g.samples
    ]
    assert first[0].id == 4


def test_seeds_are_stable_and_different():
    assert sample_seed(42, "0.0") == sample_seed(42, "0.0")
    assert len({sample_seed(s, f"{i}.{a}") for s in (1, 2) for i in range(50) for a in (0, 1)}) == 200
    assert all(0 <= sample_seed(1, str(i)) < 2**63 for i in range(100))


def test_begin_gives_each_sample_its_seed():
    producer, _ = make(lambda n, i: 1.0)
    seeds = [s.seed for g in collect(producer) for s in g.samples]
    assert seeds == [sample_seed(42, f"{i}.0") for i in range(8)]


# ----------------------------------------------------------------------------------------------------- greedy baselines


def test_every_group_gets_a_greedy_baseline_that_takes_no_id_of_a_trained_sample():
    with_one, _ = make(lambda n, i: 1.0, greedy=lambda n: float(n))
    without, _ = make(lambda n, i: 1.0)
    collect(with_one)
    collect(without)
    groups, others = collect(with_one), collect(without)
    assert [g.baseline_reward for g in groups] == [4.0, 5.0, 6.0, 7.0]
    assert [[(s.id, s.seed) for s in g.samples] for g in groups] == [
        [(s.id, s.seed) for s in g.samples] for g in others
    ]
    assert [g.baseline.id for g in groups] == [-5, -6, -7, -8]  # -1 - number of the group
    assert {g.baseline.group_id for g in groups} == {4, 5, 6, 7}
    assert all(g.baseline is None and g.baseline_reward is None for g in others)
    assert with_one.ids == without.ids
    assert with_one.source.state_dict() == without.source.state_dict()


def test_baselines_are_counted_apart_those_of_filtered_and_of_surplus_groups_too():
    producer, source = make(
        lambda n, i: float(i % 2) if n % 2 else 1.0, filters=[agree], greedy=lambda n: 0.5, over_sampling_batch_size=6
    )
    groups = collect(producer)
    metrics = producer.metrics()
    assert metrics["rollout/samples/trained"] == 8
    assert metrics["rollout/samples/baseline"] == source.at
    assert sum(count for name, count in metrics.items() if name.startswith("rollout/samples/")) == 3 * source.at
    assert batch_metrics(groups)["rollout/baseline_reward"] == 0.5
    assert "rollout/baseline_reward" not in batch_metrics([Group(0, groups[0].prompt, groups[0].samples)])


def test_a_group_without_its_baseline_is_replaced_even_where_survivors_would_do(caplog):
    producer, _ = make(lambda n, i: 1.0, greedy=lambda n: None if n == 1 else 0.25, incomplete_groups="survivors")
    groups = collect(producer)
    assert [g.prompt.metadata["n"] for g in groups] == [0, 2, 3, 4]
    metrics = producer.metrics()
    assert metrics["rollout/samples/baseline_failed"] == 3  # two samples and their baseline
    assert metrics["rollout/samples/baseline"] == 4
    assert metrics["rollout/failed_ratio"] == pytest.approx(3 / 15)
    assert [(s.id, s.error) for s in producer.lost] == [(-2, "the world ended"), (2, NO_BASELINE), (3, NO_BASELINE)]
    assert "2 samples failed: the greedy rollout of its prompt failed" in caplog.text


def test_too_many_baselines_that_fail_stop_the_run_with_the_reason_of_the_first():
    producer, _ = make(lambda n, i: 1.0, greedy=lambda n: None if n else 0.0)
    with pytest.raises(
        RolloutError, match=r"9 of 12 samples failed.*The first: sample -2 of prompt s:1: the world end"
    ):
        collect(producer)


def test_a_baseline_that_nobody_rewarded_is_a_failure():
    producer, _ = make(lambda n, i: 1.0, greedy=lambda n: 1.0)

    class Silent(FakeTask):
        async def run_group(self, group, attempts, reseed):
            await super().run_group(group, attempts, reseed)
            group.baseline.reward = group.baseline_reward = None

    producer.tasks = {"s": Silent(lambda n, i: 1.0, lambda n: 1.0)}
    with pytest.raises(RolloutError, match="12 of 12 samples failed.*sample -1 of prompt s:0: nobody rewarded it"):
        collect(producer)


@pytest.mark.parametrize("unjudged", [True, False])
def test_a_sample_needs_a_reward_unless_nothing_looks_at_rewards(unjudged):
    judged, source = make(lambda n, i: 1.0)

    class Silent(FakeTask):
        async def run_group(self, group, attempts, reseed):
            await super().run_group(group, attempts, reseed)
            for sample in group.samples:
                sample.reward, sample.error = None, "its agent: half an answer"

    producer = Waves(judged.config, source, {"s": Silent(lambda n, i: 1.0, None)}, [], unjudged=unjudged)
    if unjudged:
        assert [sample.reward for group in collect(producer) for sample in group.samples] == [None] * 8
    else:
        with pytest.raises(RolloutError, match=r"nobody rewarded it: .*; its agent: half an answer"):
            collect(producer)
