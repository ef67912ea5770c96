"""The producer whose groups come and go one by one: partial rollouts, one step off, fully asynchronous.

A group that ends makes room for the next one; a batch is full when enough have ended and passed, in whatever order.
What differs is how many may be under way, and what becomes of those that are when a batch is full:

    sync, --partial-rollout     as many as a batch, or --over-sampling-batch-size. Interrupted: parked with all they
                                have, and the first to go on when the next batch is asked for
    one_step_off                a batch. The next one begins when this one is handed out, while it is trained on; new
                                weights wait until it is generated
    fully_async                 as many as may be trained without being older than --max-weight-staleness allows. They
                                go on, under new weights when these come (--pause-generation-mode)

Which groups a batch has depends on time, except with one step off, or where nothing may be stale.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from miles.config.rollout import RolloutSection
from miles.rollout.gate import Gate
from miles.rollout.measure import oldest_version, staleness_metrics
from miles.rollout.producer import Producer, pending_rollouts
from miles.rollout.task import afresh, unfinished
from miles.types import WEIGHT_VERSION, Group, Metrics


@dataclass(frozen=True)
class Pace:
    """How far generation may run ahead of training."""

    batch: int
    """Groups."""
    batches: int
    """In the whole run: nothing is started that nobody will train on."""
    goes_on: bool
    """While a batch is trained on."""
    waits: bool
    """New weights come between two batches only."""
    staleness: int | None
    """Most steps that the weights of a group's oldest token may be behind the step that is trained on it."""
    at_once: int
    """Groups under way while a batch fills, where they do not go on."""

    @classmethod
    def of(cls, rollout: RolloutSection, batches: int) -> Pace:
        return cls(
            batch=rollout.batch_size,
            batches=batches,
            goes_on=rollout.mode != "sync",
            waits=rollout.mode == "one_step_off",
            staleness=rollout.most_staleness,
            at_once=max(rollout.batch_size, rollout.over_sampling_batch_size or 0),
        )

    def room(self, handed_out: int, version: int, asked: bool) -> int:
        """Groups that may be there, generated or under way, when so many batches were handed out.

        Args:
            version: of the weights that new ones begin with.
            asked: somebody waits for a batch.
        """
        if not self.goes_on:
            return self.at_once if asked else 0
        ahead = 1 if self.waits else version + 1 + (self.staleness or 0) - handed_out
        return self.batch * min(ahead, self.batches - handed_out)


class Going(NamedTuple):
    """A group under way."""

    group: Group
    pending: set[int]
    """Rollouts that had no fate when it was started, or went on."""


class Stream(Producer):
    """See above."""

    def __init__(self, *parts: Any, gate: Gate, pace: Pace, **options: Any):
        super().__init__(*parts, **options)
        self.gate, self.pace = gate, pace
        rollout = self.config.rollout
        self._enough_to_judge = rollout.batch_size * rollout.n_samples_per_prompt
        self.under_way: dict[asyncio.Task[None], Going] = {}
        self._begun_at: dict[int, int] = {}
        """Weight version when a group was started, by its id: no token of it is of older weights."""
        self.parked: list[Group] = []
        """Half-finished."""
        self.ready: list[Group] = []
        """Finished, and wanted by the filters."""
        self.version = self.handed_out = 0
        self._begun = self._asked = False
        self._staleness: Metrics = {}
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    async def collect(self, step: int) -> list[Group]:
        self.handed_out = step
        self._begun = self._asked = True
        self.gate.open()
        try:
            self._drop_stale()
            self._go_on()
            while self._error is None and (len(self.ready) < self.pace.batch or self._last_chance()):
                self._news.clear()
                await self._news.wait()
        finally:
            self._asked = False
        taken = self._oldest_ready()
        handed = {group.id for group in taken}
        self.ready = [group for group in self.ready if group.id not in handed]
        left = [*self.ready, *self.parked, *(going.group for going in self.under_way.values())]
        self._begun_at = {group.id: self._started_at(group) for group in left}
        self.handed_out += 1
        if self.pace.goes_on:
            self._go_on()
        elif self._error is None:
            await self.gate.close()
        if self._error is not None:  # of a group that belongs to no batch now
            raise self._error
        if self.config.rollout.mask_offpolicy_in_partial_rollout:
            _mask_older(taken, self.version)
        self._staleness = staleness_metrics(taken, step)
        return self._hand_out(taken)

    # -------------------------------------------------------------------------------------------------- group by group

    def _go_on(self) -> None:
        """Start what there is room for; what was parked comes first."""
        if self.gate.closed or self._error is not None:
            return
        parked, self.parked = self.parked, []
        for group in parked:
            self._start(group)
        room = self.pace.room(self.handed_out, self.version, self._asked)
        while len(self.ready) + len(self.under_way) < room:
            self._start(self._group(*self.source.next_prompts(1)))

    def _start(self, group: Group) -> None:
        task = asyncio.ensure_future(self._generate(group))
        self._begun_at.setdefault(group.id, self.version)
        self.under_way[task] = Going(group, pending_rollouts(group))
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        going = self.under_way.pop(task, None)
        if going is None:
            return  # it was given up
        group = going.group
        try:
            task.result()
            if unfinished(group):
                self.parked.append(group)
            else:
                self._take_in(group)
            if len(self.ready) < self.pace.batch:
                self._check_rejections(self.handed_out, len(self.ready))
            self._go_on()
        except (Exception, asyncio.CancelledError) as error:  # for whoever waits for the batch
            self._error = self._error or error
        self._news.set()

    def _take_in(self, group: Group) -> None:
        self._check_failures([group])
        if self._passes(group) and not self._dropped_as_stale(group, pending_rollouts(group)):
            self.ready.append(group)

    def _drop_stale(self) -> None:
        """What is too old by now, finished or not, makes room for others."""
        ready, parked, self.ready, self.parked = self.ready, self.parked, [], []
        self.ready += [group for group in ready if not self._dropped_as_stale(group, pending_rollouts(group))]
        self.parked += [group for group in parked if not self._dropped_as_stale(group, pending_rollouts(group))]
        for task, (group, pending) in list(self.under_way.items()):
            if self._dropped_as_stale(group, pending):
                del self.under_way[task]
                task.cancel()

    def _last_chance(self) -> bool:
        """Without something that is under way, batches to come would have fewer places than there are groups for which
        they are the last ones. Newer groups that came first took these. What was started beyond all places
        (`Pace.at_once`) is not waited for."""
        most, size = self.pace.staleness, self.pace.batch
        if most is None or self.config.rollout.stale_groups != "wait":
            return False
        taken = [self._started_at(group) for group in self._oldest_ready()]
        there = [self._started_at(group) for group in self.ready]
        there += [self._started_at(going.group) for going in self.under_way.values()]
        for later in range(most + 1):  # batches after this one
            version = self.handed_out - most + later  # they are the last ones for groups of these weights
            waiting, served = (sum(begun <= version for begun in group) for group in (there, taken))
            if min(waiting, size * (later + 1)) - served > size * later:
                return True
        return False

    def _started_at(self, group: Group) -> int:
        return self._begun_at.get(group.id, self.version)

    def _oldest_ready(self) -> list[Group]:
        return sorted(self.ready, key=lambda group: (self._started_at(group), group.id))[: self.pace.batch]

    def _dropped_as_stale(self, group: Group, pending: set[int]) -> bool:
        most, oldest = self.pace.staleness, oldest_version(group.samples)
        if most is None or oldest is None or self.handed_out - oldest <= most:
            return False
        self._settle(pending, "stale")
        if self.config.rollout.stale_groups == "retry":
            self.parked.append(self._group(group.prompt))
        return True

    # ------------------------------------------------------------------------------------------- weights, and the end

    @property
    def unquiet(self) -> bool:
        return self.pace.waits and bool(self.under_way)

    async def quiet(self) -> None:
        while self.unquiet:
            await asyncio.wait(self.under_way)

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[None]:
        """Requests wait while new weights come, or new weights for what is under way."""
        pauses = self.pace.goes_on and not self.pace.waits and bool(self.under_way)
        await self.quiet()
        if pauses:
            await self.gate.pause(self.config.rollout.pause_mode)
        try:
            yield
        finally:
            if pauses:
                await self.gate.resume()
        self.version = version
        if self._begun:
            self._go_on()

    async def close(self) -> None:
        tasks = list(self.under_way)
        self.under_way = {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------- account, state

    def metrics(self) -> Metrics:
        found = super().metrics() | self._staleness
        found["rollout/samples/pending"] = float(len(self.ledger.pending))
        return found | {f"rollout/groups/{name}": float(len(getattr(self, name))) for name in ("ready", "parked")}

    def _pending(self) -> set[int]:
        waiting = [pending_rollouts(group) for group in (*self.ready, *self.parked)]
        return set().union(*waiting, *(going.pending for going in self.under_way.values()))

    def held(self) -> list[Group]:
        """What is under way can only be begun again, from its prompts: nobody here knows how far it is."""
        parked = (_copied(group) for group in self.parked)  # it goes on while a checkpoint waits to be written
        return [*self.ready, *parked, *(_afresh(going.group) for going in self.under_way.values())]

    def load_state_dict(self, state: Mapping[str, Any], held: Sequence[Group] = ()) -> None:
        super().load_state_dict(state, held)
        for group in held:
            (self.parked if unfinished(group) else self.ready).append(group)
            if (oldest := oldest_version(group.samples)) is not None:
                self._begun_at[group.id] = oldest


def _afresh(group: Group) -> Group:
    baseline = None if group.baseline is None else afresh(group.baseline)
    rollouts = {sample.rollout_id: sample for sample in group.samples}  # siblings begin again as one
    return Group(group.id, group.prompt, [afresh(sample) for sample in rollouts.values()], baseline)


def _copied(group: Group) -> Group:
    copies = [sample.beginning(len(sample.tokens)) for sample in group.rollouts]
    for copy in copies:
        copy.metadata = deepcopy(copy.metadata)
    baseline = None if group.baseline is None else copies.pop(0)
    return replace(group, samples=copies, baseline=baseline)


def _mask_older(groups: Sequence[Group], version: int) -> None:
    """Learn from no token that older weights have drawn."""
    for sample in (sample for group in groups for sample in group.samples):
        if WEIGHT_VERSION.name in sample.columns:  # not where there was room for no token
            sample.loss_mask[sample.columns[WEIGHT_VERSION.name] < version] = 0
