"""Expert choices from the torch engine to the trainer's micro-batch: turns with an environment in between, siblings,
aborts and new weights, engines that lose rows.

The judge is one transformers forward pass over the whole stream of tokens of a sample: its router logits' top-k. Rows
are compared without the order of the experts in them. `_T` tokens, `_L` layers, `_K` experts a token.
"""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miles.api import EngineError, GenerateResult, Observation, StepResult, compact_experts, expert_choices
from miles.builtins.fsdp.prefixes import TokenTree
from miles.builtins.fsdp.ulysses import TokenSlice
from miles.builtins.generate import MultiTurn, single_turn
from miles.config import Spec
from miles.contexts import GenerateContext
from miles.experts import missing_experts, recorded_experts
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.report.dump import dump_samples
from miles.rollout.engines import EngineFront
from miles.rollout.measure import batch_metrics
from miles.testing import tiny
from miles.training.packing import build_micro_batch
from miles.training.table import Table
from miles.types import LOSS_MASK, ROUTED_EXPERTS, Group, Prompt, Sample, SamplingParams, Status

FAMILY, LAYERS, TOP_K = "qwen3_moe", 2, 2
USER = {"role": "user", "content": "hello world, what do you say?"}
STOPS = tuple(range(0, 320, 8))
"""So many tokens end a turn that a random model ends one after about eight."""


@functools.cache
def registry():
    return Registry(load_plugins())


@functools.cache
def judge(seed):
    return tiny.model(tiny.hf_config(FAMILY), seed)


@torch.no_grad()
def choices_TLK(sample, seed=0):
    """`[T - 1, L, K]`, in ascending order, of the model drawn from a seed."""
    logits = judge(seed)(torch.tensor([sample.tokens]), use_cache=False, output_router_logits=True).router_logits
    chosen = torch.stack([layer.topk(TOP_K, -1).indices for layer in logits], 1)
    return chosen.sort(-1).values[:-1].numpy()


def rows_of(sample):
    """`[T - 1, L, K]` int32 in ascending order, -1 where nothing was recorded."""
    rows = sample.columns[ROUTED_EXPERTS]
    assert rows.dtype == np.uint8
    assert rows.shape == (len(sample.tokens) - 1, LAYERS, TOP_K)
    return np.sort(expert_choices(rows), -1)


@dataclass
class Counting:
    """Answers each turn with its number."""

    turns: int = 3
    seen: int = 0

    async def reset(self, prompt):
        return Observation(())

    async def step(self, action):
        self.seen += 1
        return StepResult(({"role": "tool", "content": f"that was {self.seen}"},), 1.0, self.seen >= self.turns)

    async def close(self):
        pass

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Rollout:
    """A torch engine with a tiny mixture of experts, and samples of one prompt."""

    def __init__(self, engine, **sampling):
        self.engine, self.chat = engine, tiny.chat_format(registry())
        self.prompt = Prompt("set:0", "set", messages=[USER], tokens=self.chat.render_prompt([USER]))
        params = SamplingParams(**{"max_new_tokens": 40, "stop_token_ids": STOPS, **sampling})
        self.front = EngineFront([engine], 64)
        self.context = GenerateContext(
            self.front.generate, self.chat, params, Counting, max_context_tokens=256, routed_experts=True
        )

    def sample(self, number=0):
        return Sample.begin(self.prompt, id=number, group_id=0, seed=number)

    async def weights(self, version, seed):
        from safetensors.torch import load_file

        tensors = load_file(tiny.saved(FAMILY, seed) / "model.safetensors")
        await self.engine.receive("inprocess", version, tiny.groups_of(tensors))


def with_rollout(main, sampling=None, losing=None, **options):
    """Run `main(rollout)`; `losing` wraps the engine."""

    async def body():
        context = tiny.engine_context(registry(), tiny.hf_config(FAMILY), tiny.saved(FAMILY))
        engine = registry().build("rollout_engines", Spec(name="torch", options=options), context=context)
        await engine.start()
        try:
            rollout = Rollout(losing(engine) if losing else engine, **(sampling or {}))
            return await asyncio.wait_for(main(rollout), 60)
        finally:
            await engine.close()

    return asyncio.run(body())


async def aborted(rollout, generate, sample, new_tokens=1):
    """The sample as an abort in the middle leaves it, with at least some tokens of a turn."""
    engine = rollout.engine
    task = asyncio.ensure_future(generate(rollout.context, sample))
    while not task.done():
        await asyncio.sleep(0.0005)
        slots = engine.scheduler.slots
        if slots.count and slots.lengths_S[0] - slots.jobs[0].prompt_length >= new_tokens:
            break
    await engine.abort()
    return await task


# ------------------------------------------------------------------------------------------------------- every row


@pytest.mark.parametrize("prefix_cache_tokens", [None, 0])
def test_turns_of_siblings(prefix_cache_tokens):
    """Rows of prompt, answers and what the environment said; whether a prefix was computed or found."""

    async def main(rollout):
        play = MultiTurn()
        samples = await asyncio.gather(*(play(rollout.context, rollout.sample(i)) for i in range(5)))
        later = await play(rollout.context, rollout.sample(5))
        cached = rollout.front.take_traffic().cached_tokens
        assert cached == 0 if prefix_cache_tokens == 0 else cached > 8 * len(rollout.prompt.tokens)
        return [*samples, later]

    samples = with_rollout(main, prefix_cache_tokens=prefix_cache_tokens)
    assert sum(len(sample.turns) == 3 for sample in samples) >= 3
    for sample in samples:
        np.testing.assert_array_equal(rows_of(sample), choices_TLK(sample))
    metrics = batch_metrics([Group(0, samples[0].prompt, samples)])
    assert metrics["rollout/routed_experts_missing"] == 0


def test_the_context_is_full():
    async def main(rollout):
        rollout.context.max_context_tokens = len(rollout.prompt.tokens) + 11
        return await single_turn(rollout.context, rollout.sample())

    sample = with_rollout(main, {"stop_token_ids": ()})
    assert (sample.status, sample.response_length) == (Status.TRUNCATED, 11)
    np.testing.assert_array_equal(rows_of(sample), choices_TLK(sample))


LONG = {"stop_token_ids": (), "max_new_tokens": 180}


@pytest.mark.parametrize("new_weights", [False, True])
@pytest.mark.parametrize("generate", [single_turn, MultiTurn()], ids=["single", "multi"])
def test_abort_and_resume(generate, new_weights):
    """What was recorded stays; the pass that reads the last old token is the first of the new weights."""

    async def main(rollout):
        half = await aborted(rollout, generate, rollout.sample(), 7)
        assert half.status is Status.ABORTED
        border = len(half.tokens) - 1
        assert len(rows_of(half)) == border
        half = pickle.loads(pickle.dumps(half))  # as it would lie in a checkpoint
        if new_weights:
            await rollout.weights(2, seed=1)
        return border, await generate(rollout.context, half)

    border, sample = with_rollout(main, LONG)
    assert len(sample.tokens) > border + 20
    np.testing.assert_array_equal(rows_of(sample)[:border], choices_TLK(sample, 0)[:border])
    later = int(new_weights)
    np.testing.assert_array_equal(rows_of(sample)[border:], choices_TLK(sample, later)[border:])
    assert (choices_TLK(sample, 0) != choices_TLK(sample, 1)).any()
    assert missing_experts(sample) == 0


def test_aborted_before_it_ran():
    """Nothing was recorded, not even of the prompt: whoever resumes it records all."""

    async def main(rollout):
        await rollout.engine.pause("retract")
        task = asyncio.ensure_future(single_turn(rollout.context, rollout.sample()))
        await asyncio.sleep(0.01)
        await rollout.engine.abort()
        sample = await task
        assert (sample.status, sample.response_length) == (Status.ABORTED, 0)
        await rollout.engine.resume()
        return await single_turn(rollout.context, sample)

    sample = with_rollout(main)
    assert sample.response_length > 0
    np.testing.assert_array_equal(rows_of(sample), choices_TLK(sample))


# ------------------------------------------------------------------------------------- engines that do not tell all


@dataclass
class Losing:
    """Loses the rows of requests that are aborted, as a server does that aborts them in its queue."""

    engine: object
    generates: bool = True
    asked: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    async def generate(self, request):
        self.asked.append(request.routed_experts_from)
        result = await self.engine.generate(request)
        return replace(result, routed_experts=None) if result.finish_reason == "abort" else result


def test_lost_rows_are_computed_again_by_the_same_weights():
    async def main(rollout):
        half = await aborted(rollout, single_turn, rollout.sample(), 7)
        assert ROUTED_EXPERTS not in half.columns
        return rollout.engine.asked, await single_turn(rollout.context, half)

    asked, sample = with_rollout(main, LONG, Losing)
    assert asked == [0, 0]
    np.testing.assert_array_equal(rows_of(sample), choices_TLK(sample))


def test_lost_rows_of_other_weights_stay_empty_and_are_counted():
    """The pass that drew the token is gone, and no later one routes as it did. The prompt's rows are of the new
    weights. A later turn does not ask for them again."""

    async def main(rollout):
        half = await aborted(rollout, MultiTurn(), rollout.sample(), 7)
        start, end = half.prompt_length - 1, len(half.tokens) - 1
        await rollout.weights(2, seed=1)
        rollout.context.sampling = replace(rollout.context.sampling, stop_token_ids=STOPS)
        return start, end, rollout.engine.asked, await MultiTurn()(rollout.context, half)

    start, end, asked, sample = with_rollout(main, LONG, Losing)
    assert len(sample.turns) == 3
    assert asked == [0, 0, *(turn.end - 1 for turn in sample.turns[:-1])]
    rows, expected = rows_of(sample), choices_TLK(sample, 1)
    assert end - start >= 7
    assert (rows[start:end] == -1).all()
    np.testing.assert_array_equal(rows[:start], expected[:start])
    np.testing.assert_array_equal(rows[end:], expected[end:])
    group = Group(0, sample.prompt, [sample])
    assert batch_metrics([group])["rollout/routed_experts_missing"] == end - start
    table = Table.from_groups([group])
    batch = build_micro_batch([0], table.tokens, table.columns, specs=table.specs)
    replayed = expert_choices(batch.columns[ROUTED_EXPERTS])
    assert replayed.dtype == torch.int32
    expected_fill = [*(t in range(start, end) for t in range(len(rows))), True]
    assert (replayed == -1).all(-1).all(-1).tolist() == expected_fill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: None, "answered without"),
        (lambda rows: rows[1:], r"wants \d+ rows of expert choices and was given \d+"),
        (lambda rows: np.concatenate([rows, rows[:1]]), "rows of expert choices"),
    ],
    ids=["none", "one short", "one more"],
)
def test_rows_that_do_not_go_with_the_tokens_are_an_error(change, message):
    async def main(rollout):
        generate = rollout.context.generate

        async def wrong(request):
            result = await generate(request)
            return replace(result, routed_experts=change(result.routed_experts))

        rollout.context.generate = wrong
        return await single_turn(rollout.context, rollout.sample())

    with pytest.raises(EngineError, match=message):
        with_rollout(main)


# --------------------------------------------------------------------------------------------------- small and cheap


class Canned:
    """Says `said` tokens a turn, and which experts a model of 48 layers chose for them, as a server would."""

    generates = True

    def __init__(self, said, experts):
        self.said, self.experts, self.rows = said, experts, 0

    async def generate(self, request):
        rows = len(request.tokens) + self.said - 1 - request.routed_experts_from
        self.rows += rows
        first = request.routed_experts_from
        choices = np.broadcast_to(
            ((np.arange(first, first + rows) * 7) % self.experts).astype("int32")[:, None, None], (rows, 48, 8)
        )
        n = self.said
        return GenerateResult([5] * n, [-1.0] * n, "stop", [1] * n, compact_experts(choices, self.experts))


@pytest.mark.parametrize(("experts", "bytes_per_token"), [(128, 384), (256, 768)])
def test_many_turns_cost_what_their_tokens_do(monkeypatch, experts, bytes_per_token):
    """64 turns of a model of 48 layers and 8 experts a token: each row comes once, the column is copied a few times."""
    engine = Canned(said=200, experts=experts)
    rollout = Rollout(engine, max_new_tokens=200)
    context = replace(rollout.context, max_context_tokens=None, max_turns=64, make_environment=lambda: Counting(64))
    sample, rooms, step = rollout.sample(), [], Counting.step

    async def watched(environment, action):
        rooms.append(sample.columns[ROUTED_EXPERTS].base)  # kept, so that each has an id of its own
        return await step(environment, action)

    monkeypatch.setattr(Counting, "step", watched)
    asyncio.run(MultiTurn()(context, sample))
    rows = sample.columns[ROUTED_EXPERTS]
    tokens = len(sample.tokens)
    assert (len(sample.turns), len(rows), engine.rows) == (64, tokens - 1, tokens - 1)
    np.testing.assert_array_equal(expert_choices(rows)[:, 47, 7], (np.arange(tokens - 1) * 7) % experts)
    assert rows.nbytes == (tokens - 1) * bytes_per_token
    assert len({id(room) for room in rooms}) <= 13  # by halves of its length: log(64) / log(1.5) times, and not 64


class Crossing(Losing):
    """Behind a process boundary: buffers travel beside the pickles, and come back read-only."""

    async def generate(self, request):
        result = await self.engine.generate(request)
        buffers = []
        sent = pickle.dumps(result, 5, buffer_callback=buffers.append)
        assert [buffer.raw().nbytes for buffer in buffers] == [len(result.routed_experts) * LAYERS * TOP_K]
        arrived = pickle.loads(sent, buffers=[bytes(buffer.raw()) for buffer in buffers])
        assert not arrived.routed_experts.flags.writeable
        return arrived


def test_rows_from_another_process():
    async def main(rollout):
        return await MultiTurn()(rollout.context, rollout.sample())

    sample = with_rollout(main, losing=Crossing)
    np.testing.assert_array_equal(rows_of(sample), choices_TLK(sample))


def test_samples_on_disk_and_in_checkpoints(tmp_path):
    async def main(rollout):
        return await MultiTurn()(rollout.context, rollout.sample())

    sample = with_rollout(main)
    copy = pickle.loads(pickle.dumps(sample))
    assert copy.columns[ROUTED_EXPERTS].dtype == np.uint8
    np.testing.assert_array_equal(rows_of(copy), rows_of(sample))
    for one in (copy, sample):
        one.append([1, 2], {LOSS_MASK: 1})  # each grows on its own
    copy.columns["loss_mask"][-1] = 0
    assert sample.loss_mask[-2:].tolist() == [1, 1]
    dump_samples(tmp_path, 1, [sample], {})
    [line] = (tmp_path / "step_000001.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert ROUTED_EXPERTS not in record
    assert record["tokens"] == sample.tokens


# ------------------------------------------------------------------------------------------------------ the trainer


def test_siblings_whose_prompt_is_computed_once():
    """A train backend that computes a common prompt once takes its rows from the first sibling: they are the same."""

    async def main(rollout):
        return await asyncio.gather(*(single_turn(rollout.context, rollout.sample(i)) for i in range(4)))

    samples = with_rollout(main)
    table = Table.from_groups([Group(0, samples[0].prompt, samples)])
    batch = build_micro_batch(range(4), table.tokens, table.columns, specs=table.specs, device="cpu")
    assert batch.shared[1:] == [samples[0].prompt_length] * 3
    tree = TokenTree.of(batch.bounds, batch.shared, "cpu")
    column = batch.columns[ROUTED_EXPERTS]
    computed = tree.computed(column)
    assert len(computed) == len(column) - 3 * samples[0].prompt_length
    assert torch.equal(tree.spread(computed).sort(-1).values, column.sort(-1).values)
    last = torch.tensor(batch.bounds[1:]) - 1
    assert (~recorded_experts(column.numpy())).nonzero()[0].tolist() == last.tolist()


def test_context_parallel_slices_hold_all_rows():
    """Each rank's tokens with their rows; what pads the last slice is nobody's."""

    async def main(rollout):
        return await single_turn(rollout.context, rollout.sample())

    table = Table.from_groups([Group(0, None, [with_rollout(main)])])
    batch = build_micro_batch([0], table.tokens, table.columns, specs=table.specs)
    choices = expert_choices(batch.columns[ROUTED_EXPERTS])
    tree = TokenTree.of(batch.bounds, (), "cpu")
    slices = [TokenSlice(SimpleNamespace(size=3, rank=r, collectives=None), tree, "cpu").cut(choices) for r in range(3)]
    assert len({len(part) for part in slices}) == 1
    assert torch.equal(torch.cat(slices)[: len(choices)], choices)
