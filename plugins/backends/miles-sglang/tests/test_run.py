"""Whole training runs through faults: they go on while enough of the batch is left, and end where others end."""

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from faults import GENERATE, Fault, FaultyProxy, RandomPlan, always, first
from served import Witness, in_thread, served, tiny_context

import miles
from miles.api import Component, RolloutError, hookimpl
from miles.builtins.generate import single_turn
from miles.config import Spec
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.testing import tiny

STEPS, PROMPTS, GROUP = 3, 4, 4


def short(sample):
    """Something that varies between samples."""
    return -0.1 * len(set(sample.tokens[sample.prompt_length :]))


@pytest.fixture
def run(tmp_path):
    """`run(name, engine, **rollout)`: train, and return the run's metrics and the samples of its steps."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{i} and {i}"}) + "\n" for i in range(24)))

    def train(name, engine, plugins=(), generate="single_turn", **rollout):
        folder = tmp_path / name
        sets = [{"path": str(prompts), "sampling": {"max_new_tokens": 8}, "reward": short, "generate": generate}]
        shape = {"num_rollout": STEPS, "batch_size": PROMPTS, "n_samples_per_prompt": GROUP}
        miles.train(
            {
                "run": {"dir": str(folder), "num_threads": 1, "report": False},
                "model": {"hf_checkpoint": str(tiny.saved("llama"))},
                "data": {"sets": sets},
                "rollout": {"engine": engine, **shape, **rollout},
                "algorithm": {"advantage_estimator": "grpo", "policy_loss": "ppo_clip"},
                "optimizer": {"lr": 1e-3},
            },
            plugins=plugins,
        )
        return read(folder / "metrics.jsonl"), [read(file) for file in sorted((folder / "rollouts").iterdir())]

    return train


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def bad_day():
    """`bad_day(plan)`: a proxy with this plan, before a server with the checkpoint's weights."""
    context = tiny_context()
    engine = Registry(load_plugins()).build("rollout_engines", Spec(name="torch"), context=context)

    @asynccontextmanager
    async def behind(plan, path):
        async with served(Witness(engine), context) as url, FaultyProxy(url, plan, path=path, delay=4.0) as proxy:
            yield proxy

    return lambda plan, path=GENERATE: in_thread(behind(plan, path))


def through(proxy, **options):
    return {"name": "sglang_external", "urls": [proxy.url], "timeout": 2.0, **options}


def assert_same_samples(found, expected):
    """The same tokens under the same ids, drawn from the weights of their step, with the same log-probabilities."""
    assert len(found) == len(expected) == STEPS
    for step, (these, those) in enumerate(zip(found, expected, strict=True)):
        assert [sample["id"] for sample in these] == [sample["id"] for sample in those]
        for one, other in zip(these, those, strict=True):
            assert one["tokens"] == other["tokens"]
            assert set(one["weight_version"][one["prompt_length"] :]) == {step}
            assert one["rollout_log_probs"] == pytest.approx(other["rollout_log_probs"], abs=1e-3)


def test_a_run_through_faults_ends_as_one_without(run, bad_day):
    with bad_day(RandomPlan(seed=5, share=0.3)) as proxy:
        metrics, samples = run("spoilt", through(proxy))
        assert sum(proxy.counts.values()) > 10
    assert sum(line.get("rollout/engine/retries", 0) for line in metrics) > 10
    assert_same_samples(samples, run("calm", "torch")[1])


def unless_scoring(plan):
    """The same plan for requests that generate; the check after the first weight sync is spared."""
    return lambda asked, earlier: None if "logprob_start_len" in asked else plan(asked, earlier)


def test_a_run_goes_on_while_enough_is_left(run, bad_day):
    """Some requests always fail: their samples are FAILED and counted, the others are trained."""
    hopeless = RandomPlan(seed=2, share=0.25, faults=(Fault.ERROR_500, Fault.RESET, Fault.HTML, Fault.NO_META))
    with bad_day(unless_scoring(lambda asked, earlier: hopeless(asked, 0))) as proxy:
        metrics, samples = run("thinned", through(proxy, retries=1), max_attempts=1)
        failed = sum(record.fates[0] is not None for record in proxy.records.values())
    every = [sample for step in samples for sample in step]
    assert sorted(sample["id"] for sample in every) == list(range(STEPS * PROMPTS * GROUP))
    assert 0 < sum(sample["status"] == "failed" for sample in every) == failed
    assert all("failed 2 times" in sample["error"] for sample in every if sample["status"] == "failed")
    shares = [line["rollout/failed_ratio"] for line in metrics[1:]]
    assert sum(shares) * PROMPTS * GROUP == pytest.approx(failed)


def test_and_stops_with_an_error_when_not(run, bad_day, tmp_path):
    with bad_day(unless_scoring(always(Fault.ERROR_503))) as proxy:
        wanted = r"16 of 16 samples failed, more than rollout.max_failed_fraction=0.25. The first.*failed 2 times.*503"
        with pytest.raises(RolloutError, match=wanted):
            run("stopped", through(proxy, retries=1), max_attempts=1, max_failed_fraction=0.25)
    (dumped,) = [read(file) for file in (tmp_path / "stopped" / "rollouts").iterdir()]
    assert [sample["status"] for sample in dumped] == ["failed"] * PROMPTS * GROUP


@pytest.mark.parametrize("fault", [Fault.ERROR_500, Fault.HUNG_UP, Fault.RESET])
def test_weights_that_do_not_arrive_are_sent_again(fault, run, bad_day, caplog):
    """Every first try fails, whether the server heard of it or not."""
    with bad_day(first(fault), "/update_weights_from_disk") as proxy:
        _, samples = run("unlucky", through(proxy))
        assert proxy.counts == {fault: STEPS + 1}
    assert caplog.text.count("trying once more") == STEPS + 1
    assert_same_samples(samples, run("calm", "torch")[1])


class Murderer:
    """Kills the server in the middle of the second rollout, and once more while the trainer works after it."""

    __name__ = "murderer"

    def __init__(self, servers):
        self.servers, self.waits = servers, True

    @hookimpl
    def miles_register_generate_functions(self):
        return {"murderous": Component("murderer:generate")}

    async def generate(self, context, sample):
        if sample.id == PROMPTS * GROUP + 5 and self.waits:
            self.waits = False
            await asyncio.sleep(0.01)  # the others' requests have arrived
            self.servers.kill()
        return await single_turn(context, sample)

    @hookimpl
    def miles_on_train_step_end(self, run, step, metrics):
        if step == 1:
            self.servers.kill()


@pytest.mark.slow
def test_a_run_whose_server_is_killed_twice_ends_as_one_without(run, servers, monkeypatch, caplog):
    murderer = Murderer(servers)
    monkeypatch.setitem(sys.modules, "murderer", SimpleNamespace(generate=murderer.generate))
    metrics, samples = run("killed", "sglang", [murderer], generate="murderous")
    assert len(set(servers.pids)) == 3
    assert [line.get("rollout/engine/restarts", 0) for line in metrics] == [0, 0, 1, 1]
    assert_same_samples(samples, run("calm", "torch")[1])
