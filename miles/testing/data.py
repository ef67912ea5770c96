"""The contract of data sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from miles.config import TaskSet
from miles.contexts import DataContext
from miles.protocols import DataSource
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.types import Prompt

ROWS = 7


class DataSourceContract(ComponentContract):
    """`next_prompts(count)`, `every_prompt()`, `len`, `state_dict`, `load_state_dict`.

    Example:
        class TestFiles(DataSourceContract):
            name = "files"
    """

    kind = "data_sources"

    def write(self, folder: Path, rows: int) -> dict[str, Any]:
        """Lay out a data set of so many prompts in a folder; returns fields of its `TaskSet`. By default JSONL with
        `input` and `label`. A source that makes its prompts up may ignore it all."""
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps({"input": f"hello {i}", "label": str(i)}) + "\n" for i in range(rows)))
        return {"path": str(path)}

    @contextmanager
    def open(self, shuffle: bool = False, seed: int = 1, limit: int | None = None) -> Iterator[DataSource]:
        """The source on `ROWS` prompts."""
        with TemporaryDirectory() as folder:
            task_set = TaskSet(**{"name": "contract", **self.write(Path(folder), ROWS)})
            self._context = DataContext([task_set], tiny.chat_format(installed()), seed, limit, shuffle)
            yield self.build()

    def context(self) -> DataContext | None:
        """None where only options are looked at."""
        return getattr(self, "_context", None)

    def test_it_is_what_its_kind_asks_for(self) -> None:
        """Built as a run builds it, it has the methods of its protocol, with the right arguments."""
        with self.open() as source:
            assert len(source) > 0

    def test_prompts_are_ready_to_be_sampled(self) -> None:
        """Tokens of every prompt are rendered, once and here; what is asked is text or messages, never both."""
        with self.open() as source:
            for prompt in source.next_prompts(3):
                assert isinstance(prompt, Prompt), f"a {type(prompt).__name__} is no Prompt"
                assert prompt.tokens, f"prompt {prompt.id} has no tokens"
                assert all(isinstance(token, int) for token in prompt.tokens)
                assert (prompt.text is None) != (prompt.messages is None)
                assert prompt.task_set == "contract", "the name of its set says how the prompt is sampled and judged"

    def test_as_many_as_were_asked_for(self) -> None:
        """A batch is always full: when an epoch ends the next one begins."""
        with self.open() as source:
            for count in (1, 0, 2 * len(source) + 1):
                assert len(source.next_prompts(count)) == count

    def test_an_epoch_has_every_prompt_once(self) -> None:
        """In order or shuffled; nothing is left out and nothing comes twice before all came."""
        for shuffle in (False, True):
            with self.open(shuffle) as source:
                epochs = [sorted(prompt.id for prompt in source.next_prompts(len(source))) for _ in range(3)]
                assert len(set(epochs[0])) == len(source), "a prompt came twice in an epoch (ids must be unique)"
                assert epochs[0] == epochs[1] == epochs[2]

    def test_ids_are_stable(self) -> None:
        """The same prompt has the same id in every epoch and every run: seeds and statistics hang on it."""
        with self.open(shuffle=True) as source:
            first = {prompt.id: prompt.tokens for prompt in source.next_prompts(len(source))}
            again = {prompt.id: prompt.tokens for prompt in source.next_prompts(len(source))}
            assert first == again

    def test_the_seed_decides_the_order(self) -> None:
        """Two runs of one seed see the same prompts in the same order, however they ask for them."""
        with self.open(shuffle=True) as one, self.open(shuffle=True) as other:
            piecewise = [prompt.id for count in (1, 4, 0, 2, 7) for prompt in other.next_prompts(count)]
            assert [prompt.id for prompt in one.next_prompts(14)] == piecewise

    def test_a_resumed_source_goes_on(self) -> None:
        """From any point, also across epochs; its state survives being written to a checkpoint as JSON."""
        for drawn in (0, 3, ROWS, 2 * ROWS + 3):
            with self.open(shuffle=True) as first, self.open(shuffle=True) as second:
                first.next_prompts(drawn)
                state = json.loads(json.dumps(first.state_dict()))
                second.next_prompts(2)
                second.load_state_dict(state)
                expected = [prompt.id for prompt in first.next_prompts(9)]
                assert [prompt.id for prompt in second.next_prompts(9)] == expected, f"after {drawn} prompts"

    def test_evaluation_sees_every_prompt(self) -> None:
        """Once, in a fixed order, whatever was drawn before, and without moving what is drawn next."""
        with self.open() as source, self.open() as untouched:
            expected = [prompt.id for prompt in untouched.every_prompt()]
            assert len(set(expected)) == len(expected) > 0
            source.next_prompts(2)
            assert [prompt.id for prompt in source.every_prompt()] == expected
            untouched.next_prompts(2)
            assert [p.id for p in source.next_prompts(3)] == [p.id for p in untouched.next_prompts(3)]

    def test_prompts_that_are_too_long_are_dropped(self) -> None:
        """And counted: an engine would refuse them, in the middle of a run."""
        with self.open() as source:
            longest = max(len(prompt.tokens or []) for prompt in source.every_prompt())
            shortest = min(len(prompt.tokens or []) for prompt in source.every_prompt())
        with self.open(limit=longest) as source:
            assert all(len(prompt.tokens or []) <= longest for prompt in source.next_prompts(2 * ROWS))
        with self.open(limit=shortest - 1) as source:
            assert source.every_prompt() == []

    def test_counts_are_numbers(self) -> None:
        """They are reported as `data/...`."""
        with self.open() as source:
            source.next_prompts(3)
            counts = getattr(source, "counts", {})
            assert isinstance(counts, Mapping)
            assert all(isinstance(count, int | float) for count in counts.values())
