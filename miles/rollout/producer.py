"""The producer: from prompts to a full batch of generated, rewarded and filtered groups.

A batch is filled in waves: as many groups as are missing start together; when all are done, the filters look at them
in the order of their ids; what they drop is replaced by the next wave. Nothing depends on which sample finishes first,
so a run repeats itself.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.config import NONE, Config
from miles.errors import RolloutError
from miles.log import counted, logger
from miles.protocols import DataSource, SampleFilter
from miles.rollout.concurrent import run_all
from miles.rollout.task import JUDGED, Task
from miles.types import Group, Metrics, Prompt, Sample, Status

NO_BASELINE = "the greedy rollout of its prompt failed: there is nothing to compare it with"
NOBODY = "nobody rewarded it: neither the generate function nor a reward of its task set (for SFT: --preset sft)"


@dataclass
class Ids:
    """Counters that never go back, part of every checkpoint."""

    next_group: int = 0
    next_sample: int = 0


class Producer:
    """Collects rollout batches; `mode: sync`."""

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
        self.config, self.source, self.tasks, self.filters, self.greedy = config, source, tasks, filters, greedy
        self.needs_reward = config.algorithm.advantage_estimator.name != NONE and not unjudged
        self.ids = Ids()
        self.fates: Counter[str] = Counter()
        self.groups: list[Group] = []
        """All that were generated for a batch which is not full yet."""
        self.lost: list[Sample] = []
        """Samples of the last batch that failed, for people to read."""
        self.started = 0
        """Samples of the last batch, baselines included, whatever became of them."""

    async def collect(self, step: int) -> list[Group]:
        """The next full batch, in the order of group ids.

        Raises:
            RolloutError: too many samples failed, or the filters rejected too much; `groups` and `lost` hold them.
        """
        rollout = self.config.rollout
        target, limit = rollout.batch_size, rollout.batch_size * rollout.max_filtered_batches
        kept: list[Group] = []
        self.fates, self.groups, self.lost, self.started = Counter(), [], [], 0
        while len(kept) < target:
            if len(self.groups) >= limit:
                raise RolloutError(
                    f"step {step}: {len(self.groups)} groups were generated and only {len(kept)} of {target} passed "
                    f"({_fates(self.fates)}). Change rollout.filters, the task's difficulty, or raise "
                    f"--max-filtered-batches (now {rollout.max_filtered_batches})"
                )
            missing = max(target - len(kept), rollout.over_sampling_batch_size or 0)
            wave = [self._group(prompt) for prompt in self.source.next_prompts(missing)]
            await run_all(self._generate(group) for group in wave)
            self.groups += wave
            self._check_failures(wave)
            for group in filter(self._passes, wave):
                self._count("trained" if len(kept) < target else "surplus", len(group.samples))
                kept.append(group)
        self.groups = []
        return kept[:target]

    def _group(self, prompt: Prompt) -> Group:
        task = self.tasks[prompt.task_set]
        size = task.set.n_samples_per_prompt or self.config.rollout.n_samples_per_prompt
        group_id, first = self.ids.next_group, self.ids.next_sample
        self.ids = Ids(group_id + 1, first + size)
        names = [*range(first, first + size), *([-1 - group_id] if self.greedy else [])]  # takes no id of a trained one
        samples = [Sample.begin(prompt, id=i, group_id=group_id, seed=self._seed(i, 0)) for i in names]
        return Group(group_id, prompt, samples[:size], baseline=samples[size] if self.greedy else None)

    def _seed(self, sample_id: int, attempt: int) -> int:
        return sample_seed(self.config.data.seed, f"{sample_id}.{attempt}")

    async def _generate(self, group: Group) -> None:
        started = time.perf_counter()
        await self.tasks[group.prompt.task_set].run_group(
            group, self.config.rollout.max_attempts, lambda sample, attempt: self._seed(sample.id, attempt)
        )
        seconds = time.perf_counter() - started
        for sample in group.rollouts:
            sample.metadata.setdefault("seconds", seconds)
            if self.needs_reward and sample.reward is None and sample.status in JUDGED:
                sample.status, sample.error = Status.FAILED, NOBODY
        if group.baseline is not None and group.baseline.status not in JUDGED:
            for sample in group.samples:
                if sample.status in JUDGED:
                    sample.status, sample.error = Status.FAILED, NO_BASELINE

    def _check_failures(self, wave: list[Group]) -> None:
        """Note what failed; stop when too much of the whole batch did."""
        samples = [sample for group in wave for sample in group.rollouts]
        failed = [sample for sample in samples if sample.status is Status.FAILED]
        errors = Counter(sample.error for sample in failed if sample.error not in {s.error for s in self.lost})
        for error, count in errors.most_common(3):
            logger.warning("%d sample%s failed: %s", count, "s" * (count != 1), error)
        if len(errors) > 3:  # those that quote a response or a request are all different
            logger.warning("... and so on: %d different errors, all in rollouts/", len(errors))
        self.lost += failed
        self.started += len(samples)
        if len(self.lost) > self.config.rollout.max_failed_fraction * self.started:
            first = self.lost[0]
            raise RolloutError(
                f"{len(self.lost)} of {self.started} samples failed, more than rollout.max_failed_fraction="
                f"{self.config.rollout.max_failed_fraction}. The first: sample {first.id} of prompt "
                f"{first.prompt.id}: {first.error}"
            )

    def _passes(self, group: Group) -> bool:
        """Drop unusable samples, then ask the filters. Every sample's fate is counted."""
        if group.baseline is not None:
            if group.baseline.status not in JUDGED:
                self._count("baseline_failed", len(group.rollouts))
                return False
            self._count("baseline", 1)
        good = [sample for sample in group.samples if sample.status in JUDGED]
        lost = len(group.samples) - len(good)
        if lost and (self.config.rollout.incomplete_groups == "refill" or not good):
            self._count("incomplete_group", len(group.samples))
            return False
        self._count("failed", lost)
        group.samples = good
        for name, accepts in zip(self.config.rollout.filters, self.filters, strict=True):
            verdict = accepts(group)
            if not verdict.keep:
                self._count(f"{name.name}/{verdict.reason}" if verdict.reason else name.name, len(good))
                return False
        return True

    def _count(self, fate: str, samples: int) -> None:
        if samples:
            self.fates[fate] += samples

    def metrics(self) -> Metrics:
        """What became of the samples of the last batch, and of the prompts of the whole run."""
        counts = {f"rollout/samples/{fate}": float(count) for fate, count in sorted(self.fates.items())}
        counts["rollout/failed_ratio"] = len(self.lost) / max(self.started, 1)
        dropped = getattr(self.source, "counts", {})
        return counts | {f"data/{name}": float(count) for name, count in sorted(dropped.items())}

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self.ids), "data": self.source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ids = Ids(state["next_group"], state["next_sample"])
        self.source.load_state_dict(state["data"])


def sample_seed(seed: int, name: str) -> int:
    """A 63-bit seed that is the same on every machine and unrelated for every name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _fates(fates: Counter[str]) -> str:
    return ", ".join(f"{fate}: {counted(count, 'sample')}" for fate, count in fates.most_common())
