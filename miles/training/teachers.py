"""Teachers: models that say how likely they find what the policy said.

The driver decides who teaches which sample and attaches what was said of the sampled tokens as columns. A teacher is a
model of the trainer (of its own, or the policy itself), or a server that an engine speaks to. It may be told more than
the policy was: then its prompt differs, and what it says of the response is laid beside the policy's response.

Losses that compare whole distributions ask for logits while they run, in the worker, where the teacher's model is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from miles.config.teacher import DEFAULT, POLICY, TeacherSection
from miles.errors import DataError, TrainError
from miles.protocols import ChatFormat, RolloutEngine, TrainBackend, Want
from miles.training.packing import build_micro_batch
from miles.training.table import Lesson, Table
from miles.types import TEACHER_LOG_PROBS, MicroBatch, Sample

LOGITS: frozenset[Want] = frozenset({"logits"})
TOP_K = ("teacher_top_k_ids", "teacher_top_k_log_probs")
Forward = Callable[[str, Table], Awaitable[list[np.ndarray]]]
"""(model, table) -> log-probs of each row."""


def model_name(section: TeacherSection, teacher: str) -> str:
    """What a local teacher is called among the models of a worker."""
    return "actor" if section.load[teacher] == POLICY else f"teacher/{teacher}"


@dataclass
class Teachers:
    """The driver's half.

    Args:
        engines: teacher's name -> what speaks to its server.
        chat: renders what a teacher is told instead of the prompt.
        log_probs: whether those of the sampled tokens are wanted.
        top_k: how many of a server's most likely tokens are wanted, 0 for none.
    """

    section: TeacherSection
    engines: Mapping[str, RolloutEngine]
    chat: ChatFormat
    temperature: float
    log_probs: bool = True
    top_k: int = 0

    def lesson(self, sample: Sample) -> Lesson:
        """Who teaches a sample, and what the teacher reads.

        Raises:
            DataError: the prompt names a teacher that is not there, or lacks what its teacher shall be told.
        """
        section, metadata = self.section, sample.prompt.metadata
        name = str(metadata.get(section.key, DEFAULT))
        if name not in section.load and name not in section.urls:
            known = ", ".join(sorted({*section.load, *section.urls}))
            raise DataError(
                f"prompt {sample.prompt.id} wants the teacher {name!r} (metadata key {section.key!r}; without it, "
                f"{DEFAULT!r}); there are {known}"
            )
        tokens = None
        if section.prompt_key is not None:
            if section.prompt_key not in metadata:
                raise DataError(
                    f"prompt {sample.prompt.id} has no metadata key {section.prompt_key!r} (teacher.prompt_key), with "
                    "what its teacher shall be told"
                )
            told = metadata[section.prompt_key]
            prompt = self.chat.render_text(told) if isinstance(told, str) else self.chat.render_prompt(told)
            tokens = np.array([*prompt, *sample.tokens[sample.prompt_length :]], dtype=np.int64)
        return Lesson(model_name(section, name) if name in section.load else "", name, tokens)

    async def teach(self, table: Table, samples: Mapping[int, Sample], forward: Forward) -> None:
        """Give each row its lesson, and attach `teacher_log_probs` and the top-k columns as far as they are wanted."""
        table.lessons, lengths = [self.lesson(samples[i]) for i in table.ids], table.lengths
        rows: dict[tuple[str, str], list[int]] = {}
        for row, lesson in enumerate(table.lessons):
            rows.setdefault((lesson.model, lesson.teacher), []).append(row)
        said: dict[str, dict[int, np.ndarray]] = {}
        for (model, teacher), those in rows.items():
            read = _as_read(table.take(those))
            found = await (self._locally(model, read, forward) if model else self._by_server(teacher, read))
            for name, columns in found.items():
                for row, values, expected in zip(those, columns, read.lengths, strict=True):
                    if len(values) != expected:
                        what = f"{len(values)} things of the {expected} tokens of sample {table.ids[row]}"
                        raise TrainError(f"teacher {teacher!r} said {what}")
                    said.setdefault(name, {})[row] = _last(values, lengths[row])
        table.columns.update({name: [of_row[row] for row in range(len(table))] for name, of_row in said.items()})

    async def _locally(self, model: str, read: Table, forward: Forward) -> dict[str, list[np.ndarray]]:
        return {TEACHER_LOG_PROBS.name: await forward(model, read)} if self.log_probs else {}

    async def _by_server(self, teacher: str, read: Table) -> dict[str, list[np.ndarray]]:
        engine: Any = self.engines[teacher]
        tokens = [row.tolist() for row in read.tokens]
        found: dict[str, list[np.ndarray]] = {}
        if self.log_probs:
            scored = await asyncio.gather(*(engine.score(row, self.temperature) for row in tokens))
            found[TEACHER_LOG_PROBS.name] = [np.asarray(values, dtype=np.float32) for values in scored]
        if self.top_k:
            pairs = await asyncio.gather(*(engine.score_top(row, self.top_k, self.temperature) for row in tokens))
            found |= {name: [pair[i] for pair in pairs] for i, name in enumerate(TOP_K)}
        return found


def _as_read(table: Table) -> Table:
    """The rows as their teacher reads them, with nothing but their mask."""
    told = [lesson.tokens for lesson in table.lessons]
    tokens = [own if read is None else read for read, own in zip(told, table.tokens, strict=True)]
    masks = [_last(mask, len(read)) for mask, read in zip(table.columns["mask"], tokens, strict=True)]
    return replace(table, tokens=tokens, columns={"mask": masks}, present={})


def _last(values: np.ndarray, count: int) -> np.ndarray:
    """What is said of the last `count` tokens, 0 before those of which nothing is said. Two readings of a sample end
    alike: what they differ in is the prompt."""
    missing = count - len(values)
    if missing > 0:
        return np.concatenate([np.zeros((missing, *values.shape[1:]), values.dtype), values])
    return values[-missing:]


# ---------------------------------------------------------------------------------------------------- in the worker


@dataclass(frozen=True)
class _Span:
    """Tokens `[start, end)` of a micro-batch, of which a teacher speaks in row `token + offset` of its logits."""

    start: int
    end: int
    logits: Callable[[int, int], Tensor]
    offset: int
    first: int
    """Where its speech begins: it may have read a shorter prompt."""

    def __call__(self, start: int, end: int) -> Tensor:
        start, end = max(start, self.start), min(end, self.end)
        spoken = min(max(start, self.first), end)
        return functional.pad(self.logits(spoken + self.offset, end + self.offset), (0, 0, spoken - start, 0))


@dataclass(frozen=True)
class TeacherLogits:
    """`(start, end) -> [end - start, V]`: the teachers' logits where the policy's `Outputs.logits` are its own; 0 in
    rows of which a teacher, having read another prompt, says nothing."""

    spans: Sequence[_Span]

    def __call__(self, start: int, end: int) -> Tensor:
        within = [span for span in self.spans if span.start < end and start < span.end]
        return torch.cat([span(start, end) for span in within or self.spans[:1]])

    @classmethod
    def ask(
        cls,
        batches: Sequence[MicroBatch],
        lessons: Mapping[int, Lesson],
        models: Mapping[str, TrainBackend],
        teachers: Sequence[str],
    ) -> list[TeacherLogits]:
        """Has the `teachers` among `models` read the micro-batches of a step. Ranks that share a teacher ask together:
        all of them ask all teachers, in one order, each about every micro-batch, of which it may teach nothing. The
        policy may be one of them, as it is before the step. Holds their hidden states until it is dropped."""
        taught = [[lessons[i] for i in batch.sample_ids] for batch in batches]
        read = [_readings(batch, of_batch) for batch, of_batch in zip(batches, taught, strict=True)]
        spans: list[list[_Span]] = [[] for _ in batches]
        for model in teachers:
            rows = [[row for row, lesson in enumerate(of_batch) if lesson.model == model] for of_batch in taught]
            asked = [
                build_micro_batch(those, texts, {}, device=batch.tokens_T.device)
                for those, texts, batch in zip(rows, read, batches, strict=True)
            ]
            for i, outputs in enumerate(models[model].forward(asked, LOGITS)):
                assert outputs.logits is not None
                for row, ends in zip(rows[i], asked[i].bounds[1:], strict=True):
                    start, end = batches[i].bounds[row : row + 2]
                    first = end - min(end - start, len(read[i][row]))
                    spans[i].append(_Span(start, end, outputs.logits, ends - end, first))
                if not len(batches[i]):
                    spans[i].append(_Span(0, 0, outputs.logits, 0, 0))
        return [cls(sorted(found, key=lambda span: span.start)) for found in spans]


def _readings(batch: MicroBatch, lessons: Sequence[Lesson]) -> list[np.ndarray]:
    """Each sample as its teacher reads it."""
    own = batch.tokens_T.cpu().numpy()
    return [
        own[start:end] if lesson.tokens is None else lesson.tokens
        for lesson, (start, end) in zip(lessons, pairwise(batch.bounds), strict=True)
    ]
