"""Stand-ins for whatever a producer works with: an engine of a token a tick, a task of one turn and a tool, prompts."""

import asyncio
from types import SimpleNamespace

from miles.config import Config
from miles.contexts import GenerateContext
from miles.protocols import EngineHealth
from miles.rollout.gate import Gate
from miles.rollout.producer import Waves
from miles.rollout.stream import Pace, Stream
from miles.rollout.task import unfinished
from miles.turns import take_turn
from miles.types import GenerateResult, Prompt, SamplingParams, Status

TICK = 0.001


class Engine:
    """Draws one token a tick for each request: 1000 * version + position. A response has as many as `length(seed)`
    says."""

    generates = True

    def __init__(self, length):
        self.length, self.version, self.running = length, 0, set()
        self.paused, self.mode, self.aborted, self.most = False, None, 0, 0

    async def generate(self, request):
        tokens, versions = [], []
        mark = object()
        self.running.add(mark)
        self.most = max(self.most, len(self.running))
        while mark in self.running and len(tokens) < request.sampling.max_new_tokens:
            await asyncio.sleep(TICK)
            if self.paused:
                continue
            tokens.append(1000 * self.version + len(request.tokens) + len(tokens))
            versions.append(self.version)
            if len(request.tokens) + len(tokens) > self.length(request.id):
                self.running.discard(mark)
                return GenerateResult(tokens, [-1.0] * len(tokens), "stop", versions)
        aborted = mark not in self.running
        self.running.discard(mark)
        return GenerateResult(tokens, [-1.0] * len(tokens), "abort" if aborted else "length", versions)

    async def abort(self, request_id=None):
        self.aborted += len(self.running)
        self.running.clear()
        await asyncio.sleep(TICK)

    async def pause(self, mode):
        self.paused, self.mode = True, mode
        if mode == "abort":
            await self.abort()

    async def resume(self):
        self.paused = False

    async def health(self):
        return EngineHealth(self.version, len(self.running), 0)


class Work:
    """A task whose samples take one turn, and then as long as `tool(sample id)` says."""

    def __init__(self, gate, tool=lambda i: 0.0, outcome=lambda i: 1.0):
        self.gate, self.tool, self.outcome = gate, tool, outcome
        self.set = SimpleNamespace(n_samples_per_prompt=None)
        self.context = GenerateContext(gate.generate, None, SamplingParams(max_new_tokens=10_000))

    def environment_metrics(self):
        return {}

    async def run_group(self, group, attempts, reseed):
        await asyncio.gather(*(self.one(s) for s in group.rollouts if s.status is Status.PENDING))
        for sample in () if unfinished(group) else group.rollouts:
            sample.reward = self.outcome(sample.id)
            sample.status = Status.COMPLETED if sample.reward is not None else Status.FAILED
            sample.error = None if sample.reward is not None else f"no luck with {sample.id}"
        return group

    async def one(self, sample):
        if await take_turn(self.context, sample) == "abort":
            return
        await asyncio.sleep(self.tool(sample.id))
        sample.status = Status.COMPLETED


class Source:
    def __init__(self):
        self.at = 0

    def next_prompts(self, count):
        self.at += count
        return [
            Prompt(f"s:{i}", "s", text=str(i), tokens=[1], metadata={"n": i}) for i in range(self.at - count, self.at)
        ]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class House:
    """A producer with all that it stands on; `train` is what the loop does between two batches."""

    def __init__(self, length=lambda i: 5, steps=100, filters=(), tool=lambda i: 0.0, outcome=lambda i: 1.0, **rollout):
        names = [{"name": f"f{i}"} for i in range(len(filters))]
        settings = {"batch_size": 4, "n_samples_per_prompt": 2, "filters": names, **rollout}
        self.config = Config.model_validate({"rollout": settings})
        self.engine = Engine(lambda request: length(int(request.partition(".")[0])))
        self.gate, self.source = Gate([self.engine], 512), Source()
        work = Work(self.gate, tool, outcome)
        parts = (self.config, self.source, {"s": work}, list(filters))
        section = self.config.rollout
        pace = Pace.of(section, steps)
        waves = section.mode == "sync" and not section.partial_rollout
        self.producer = Waves(*parts) if waves else Stream(*parts, gate=self.gate, pace=pace)

    async def train(self, step, seconds=0.0, interval=1):
        await asyncio.sleep(seconds)
        if (step + 1) % interval == 0:
            async with self.producer.updating(step + 1):
                self.engine.version = step + 1

    async def steps(self, count, first=0, seconds=0.0, interval=1):
        async with self.producer.updating(first):
            self.engine.version = first
        batches = []
        for step in range(first, first + count):
            batches.append(await self.producer.collect(step))
            await self.train(step, seconds, interval)
        return batches
