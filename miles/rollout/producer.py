"""The producer: from prompts to a full batch of generated, rewarded and filtered groups.

`Waves` fills a batch in waves: as many groups as are missing start together; when all are done, the filters look at
them in the order of their ids; what they drop is replaced by the next wave. Nothing depends on which sample finishes
first, so a run repeats itself. `miles.rollout.stream` has the producer whose groups come and go one by one.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence, Sized
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from miles.config import NONE, Config
from miles.environments import COUNTS
from miles.errors import RolloutError
from miles.log import counted, logger
from miles.protocols import DataSource, SampleFilter
from miles.rollout.concurrent import run_all
from miles.rollout.ledger import TRAINED, Ledger
from miles.rollout.task import JUDGED, RETRIED, Task, unfinished
from miles.turns import RESTARTED
from miles.types import Group, Metrics, Prompt, Sample, Status

NO_BASELINE = "the greedy rollout of its prompt failed: there is nothing to compare it with"
NOBODY = "nobody rewarded it: neither the generate function nor a reward of its task set (for SFT: --preset sft)"


@dataclass
class Ids:
    """Counters that never go back, part of every checkpoint."""

    next_group: int = 0
    next_sample: int = 0


@dataclass
class Tally:
    """Of one batch, while it fills."""

    groups: list[Group] = field(default_factory=list)
    """All that were generated for it."""
    fates: Counter[str] = field(default_factory=Counter)
    """Rollouts, by what became of them."""
    lost: list[Sample] = field(default_factory=list)
    """Samples that failed, for people to read."""
    started: int = 0
    """Samples that were generated, baselines included, whatever became of them."""
    restarted: int = 0
    """Times that one of them began again from its prompt, having lost what it had."""
    retried: int = 0
    """Attempts at one of them that failed and were not the last."""


class Batches(ABC):
    """Where the batches of a run come from, one a step."""

    source: Sized
    groups: Sequence[Group]
    """Those of a batch that could not be filled."""
    lost: Sequence[Sample]
    """Samples that failed, of the last batch and of one that could not be filled."""
    on_policy: bool
    """Whether each batch is drawn by the very weights that are trained on it."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.handed: set[int] = set()
        """Rollouts of the last batch."""

    @abstractmethod
    async def collect(self, step: int) -> list[Group]:
        """The next full batch, in the order of group ids.

        Raises:
            RolloutError: too many samples failed, or the filters rejected too much; `groups` and `lost` hold them.
        """

    @abstractmethod
    def metrics(self) -> Metrics:
        """What became of the rollouts of the last batch."""

    def take_removed(self, groups: Iterable[Group]) -> Metrics:
        """Count those of the last batch that a plugin took out of it, and so are not trained."""
        missing = self.handed - trained_rollouts(groups)
        self.handed = set()
        if missing:
            self.ledger.remove(len(missing))
        return {"rollout/samples/removed": float(len(missing))} if missing else {}

    @property
    def unquiet(self) -> bool:
        """Whether new weights have to wait for rollouts."""
        return False

    async def quiet(self) -> None:  # noqa: B027  (most have nothing to wait for)
        """Return when they need not."""

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[None]:
        """Around a weight sync."""
        yield

    async def close(self) -> None:  # noqa: B027  (most have nothing to end)
        """Nothing goes on afterwards."""

    def held(self) -> list[Group]:
        """Groups that a checkpoint has to keep: finished ones that nobody was given yet, and half-finished ones."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Without the groups that are `held`."""
        return {"ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], held: Sequence[Group] = ()) -> None:
        self.ledger.load_state_dict(state["ledger"], [rollout for group in held for rollout in pending_rollouts(group)])


class Producer(Batches):
    """What all have in common that generate: groups, their ids and seeds, and an account of every rollout."""

    source: DataSource

    def __init__(
        self,
        config: Config,
        source: DataSource,
        tasks: Mapping[str, Task],
        filters: list[SampleFilter],
        greedy: bool = False,
        unjudged: bool = False,
    ):
        """`greedy`: every group gets a `baseline`, a greedy rollout of its prompt that is not trained. `unjudged`:
        nothing looks at rewards, and a sample without one is fine."""
        super().__init__()
        self.config, self.source, self.tasks, self.filters, self.greedy = config, source, tasks, filters, greedy
        self.on_policy = config.on_policy
        self.needs_reward = config.algorithm.advantage_estimator.name != NONE and not unjudged
        self.ids = Ids()
        self.filling = Tally()
        self.tally = self.filling
        """Of the batch that was handed out last."""

    @property
    def groups(self) -> list[Group]:  # type: ignore[override]
        return self.filling.groups

    @property
    def lost(self) -> list[Sample]:  # type: ignore[override]
        return [*self.tally.lost, *(self.filling.lost if self.filling is not self.tally else ())]

    def _group(self, prompt: Prompt) -> Group:
        task = self.tasks[prompt.task_set]
        size = task.set.n_samples_per_prompt or self.config.rollout.n_samples_per_prompt
        group_id, first = self.ids.next_group, self.ids.next_sample
        self.ids = Ids(group_id + 1, first + size)
        names = [*range(first, first + size), *([-1 - group_id] if self.greedy else [])]  # takes no id of a trained one
        self.ledger.start(names)
        samples = [Sample.begin(prompt, id=i, group_id=group_id, seed=self._seed(i, 0)) for i in names]
        return Group(group_id, prompt, samples[:size], baseline=samples[size] if self.greedy else None)

    def _seed(self, sample_id: int, attempt: int) -> int:
        return sample_seed(self.config.data.seed, f"{sample_id}.{attempt}")

    async def _generate(self, group: Group) -> None:
        started = time.perf_counter()
        await self.tasks[group.prompt.task_set].run_group(
            group, self.config.rollout.max_attempts, lambda sample, attempt: self._seed(sample.id, attempt)
        )
        if unfinished(group):
            return
        seconds = time.perf_counter() - started
        for sample in group.rollouts:
            sample.metadata.setdefault("seconds", seconds)
            if self.needs_reward and sample.reward is None and sample.status in JUDGED:
                sample.status, sample.error = Status.FAILED, "; ".join(filter(None, (NOBODY, sample.error)))
        if group.baseline is not None and group.baseline.status not in JUDGED:
            for sample in group.samples:
                if sample.status in JUDGED:
                    sample.status, sample.error = Status.FAILED, NO_BASELINE

    def _check_failures(self, wave: Sequence[Group]) -> None:
        """Note what failed; stop when too much of the whole batch did."""
        tally = self.filling
        samples = [sample for group in wave for sample in group.rollouts]
        failed = [sample for sample in samples if sample.status is Status.FAILED]
        errors = Counter(sample.error for sample in failed if sample.error not in {s.error for s in tally.lost})
        for error, count in errors.most_common(3):
            logger.warning("%d sample%s failed: %s", count, "s" * (count != 1), error)
        if len(errors) > 3:  # those that quote a response or a request are all different
            logger.warning("... and so on: %d different errors, all in rollouts/", len(errors))
        tally.groups += wave
        tally.lost += failed
        tally.started += len(samples)
        restarted = sum(sample.metadata.get(RESTARTED, 0) for sample in samples)
        tally.restarted += restarted
        tally.retried += sum(len(sample.metadata.get(RETRIED, ())) for sample in samples)
        self.ledger.restarted += restarted
        most = self.config.rollout.max_failed_fraction
        if len(tally.lost) > most * max(tally.started, self._enough_to_judge):
            first = tally.lost[0]
            raise RolloutError(
                f"{len(tally.lost)} of {tally.started} samples failed, more than rollout.max_failed_fraction={most}. "
                f"The first: sample {first.id} of prompt {first.prompt.id}: {first.error}"
            )

    _enough_to_judge = 0
    """Samples of which some share must have failed before that stops a run."""

    def _check_rejections(self, step: int, kept: int) -> None:
        """Stop when filters leave too little of what is generated."""
        tally, rollout = self.filling, self.config.rollout
        if len(tally.groups) >= rollout.batch_size * rollout.max_filtered_batches:
            raise RolloutError(
                f"step {step}: {len(tally.groups)} groups were generated and only {kept} of {rollout.batch_size} "
                f"passed ({_fates(tally.fates)}). Change rollout.filters, the task's difficulty, or raise "
                f"--max-filtered-batches (now {rollout.max_filtered_batches})"
            )

    def _passes(self, group: Group) -> bool:
        """Drop unusable samples, then ask the filters. Every rollout that is dropped gets its fate here."""
        every = trained_rollouts([group])
        if group.baseline is not None:
            if group.baseline.status not in JUDGED:
                return self._drop(every | {group.baseline.rollout_id}, "baseline_failed")
            self._settle({group.baseline.rollout_id}, "baseline")
        group.samples, unusable = [s for s in group.samples if s.status in JUDGED], group.samples
        left = trained_rollouts([group])
        if len(left) < len(every) and (self.config.rollout.incomplete_groups == "refill" or not left):
            return self._drop(every, "incomplete_group")
        aborted = {s.rollout_id for s in unusable if s.status is Status.ABORTED} - left
        self._settle(aborted, "aborted")
        self._settle(every - left - aborted, "failed")
        for name, accepts in zip(self.config.rollout.filters, self.filters, strict=True):
            verdict = accepts(group)
            if not verdict.keep:
                return self._drop(left, f"{name.name}/{verdict.reason}" if verdict.reason else name.name)
        return True

    def _drop(self, ids: Collection[int], fate: str) -> bool:
        self._settle(ids, fate)
        return False

    def _settle(self, ids: Collection[int], fate: str) -> None:
        if ids:
            self.ledger.settle(ids, fate)
            self.filling.fates[fate] += len(ids)

    def _hand_out(self, groups: list[Group]) -> list[Group]:
        """A full batch, in the order of ids; what is generated from now on is of the next one."""
        self.handed = trained_rollouts(groups)
        self._settle(self.handed, TRAINED)
        self.tally, self.filling = self.filling, Tally()
        self.ledger.check(self._pending())
        return sorted(groups, key=lambda group: group.id)

    def _pending(self) -> set[int]:
        """Rollouts that somebody here has a hold of."""
        return set()

    def metrics(self) -> Metrics:
        """What became of the rollouts of the last batch, and of the prompts of the whole run."""
        counts = {f"rollout/samples/{fate}": float(count) for fate, count in sorted(self.tally.fates.items())}
        counts["rollout/failed_ratio"] = len(self.tally.lost) / max(self.tally.started, 1)
        for name in ("restarted", "retried"):
            if count := getattr(self.tally, name):
                counts[f"rollout/samples/{name}"] = float(count)
        for task_set, task in self.tasks.items():
            for name, value in task.environment_metrics().items():
                counts[f"{'rollout' if name in COUNTS else 'perf'}/environment/{task_set}/{name}"] = value
        dropped = getattr(self.source, "counts", {})
        return counts | {f"data/{name}": float(count) for name, count in sorted(dropped.items())}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {**vars(self.ids), "data": self.source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], held: Sequence[Group] = ()) -> None:
        super().load_state_dict(state, held)
        self.ids = Ids(state["next_group"], state["next_sample"])
        self.source.load_state_dict(state["data"])


class Waves(Producer):
    """Nothing is generated between two batches, and nothing is kept: `mode: sync`."""

    async def collect(self, step: int) -> list[Group]:
        rollout = self.config.rollout
        self.filling = Tally()
        kept: list[Group] = []
        while len(kept) < rollout.batch_size:
            self._check_rejections(step, len(kept))
            missing = max(rollout.batch_size - len(kept), rollout.over_sampling_batch_size or 0)
            wave = [self._group(prompt) for prompt in self.source.next_prompts(missing)]
            await run_all(self._generate(group) for group in wave)
            self._check_failures(wave)
            kept += filter(self._passes, wave)
        self._settle(trained_rollouts(kept[rollout.batch_size :]), "surplus")
        return self._hand_out(kept[: rollout.batch_size])


def trained_rollouts(groups: Iterable[Group]) -> set[int]:
    """Ids of what groups have to train on: of all but their baselines."""
    return {sample.rollout_id for group in groups for sample in group.samples}


def pending_rollouts(group: Group) -> set[int]:
    """Ids that have no fate yet: the baseline of a finished group has."""
    return {sample.rollout_id for sample in (group.rollouts if unfinished(group) else group.samples)}


def sample_seed(seed: int, name: str) -> int:
    """A 63-bit seed that is the same on every machine and unrelated for every name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _fates(fates: Counter[str]) -> str:
    return ", ".join(f"{fate}: {counted(count, 'sample')}" for fate, count in fates.most_common())
