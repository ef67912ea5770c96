"""What benchmarks share: a checkpoint with random weights, and a job that is built from it when somebody asks."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from inspect import isawaitable
from pathlib import Path
from typing import Any

import torch

from miles.bench.sizes import Size
from miles.build import Parts, build
from miles.config.load import Resolved, resolve
from miles.plugins import load_plugins
from miles.protocols import RolloutEngine
from miles.registry import Registry
from miles.tracking import Tracking
from miles.types import LOSS_MASK, ROLLOUT_LOG_PROBS, Group, Prompt, Sample

SEED = 1234
BYTES = 256
"""Tokens that prompts are drawn from; a large model has more."""
END = "<end>"


class Workbench:
    """Everything in it follows from a seed and lies in a folder that its owner removes."""

    def __init__(self, size: Size, device: str, folder: Path, stack: AsyncExitStack, block: Sequence[str] = ()):
        """`stack` closes what is built here; `block`: plugins that are left out."""
        self.size, self.device, self.folder, self.stack, self.block = size, device, folder, stack, block
        self.draw = random.Random(SEED)
        self.opponents: dict[str, Any] = {}
        """Processes of `against`, by kind."""
        self._parts: Parts | None = None

    # ---------------------------------------------------------------------------------------------------- the material

    @cached_property
    def registry(self) -> Registry:
        return Registry(load_plugins(self.block))

    @cached_property
    def checkpoint(self) -> Path:
        """A Hugging Face folder: Qwen3 with random weights, a tokenizer with one token a byte."""
        folder = self.folder / "model"
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder)
        self._random_model(tokenizer.eos_token_id).save_pretrained(folder)
        return folder

    def _random_model(self, end_token: int) -> Any:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            **self.size.model, tie_word_embeddings=True, eos_token_id=end_token, bos_token_id=None, pad_token_id=None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return Qwen3ForCausalLM(config)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Other tokens with every call, so that no cache knows them."""
        return [self.draw.choices(range(BYTES), k=length) for _ in range(count)]

    def spread_lengths(self, count: int) -> list[int]:
        """Response lengths from `longest / count` to `longest` in even steps, in an order drawn from the seed."""
        lengths = [max(self.size.longest * (i + 1) // count, 1) for i in range(count)]
        random.Random(SEED).shuffle(lengths)
        return lengths

    async def mean_seconds(self, work: Callable[[], Any]) -> float:
        """Of one call of `work`, over as many as fill a round; what can be awaited is."""
        started, calls, seconds = time.perf_counter(), 0, 0.0
        while not calls or seconds < self.size.seconds:
            done = work()
            if isawaitable(done):
                await done
            calls, seconds = calls + 1, time.perf_counter() - started
        return seconds / calls

    # --------------------------------------------------------------------------------------------------------- the job

    def resolve(self, name: str, overrides: Mapping[str, Any] | None = None) -> Resolved:
        """A GRPO job on this checkpoint, whose responses are `new_tokens` long and judged by their digits."""
        size = self.size
        settings = {
            "run": {"dir": str(self.folder / name), "seed": SEED, "report": False},
            "model": {"hf_checkpoint": str(self.checkpoint)},
            "data": {
                "sets": [
                    {
                        "path": str(self._prompt_file),
                        "sampling": {"max_new_tokens": size.new_tokens},
                    }
                ]
            },
            "rollout": {"batch_size": max(size.requests // 8, 1), "n_samples_per_prompt": 8, "num_rollout": 1},
            "algorithm": {"advantage_estimator": "grpo"},
            "train": {"dtype": size.dtype},
            "optimizer": {"lr": 1e-6},
            "resources": {"device": self.device},
        }
        given = {"data.sets.*.reward": digits, **(overrides or {})}
        return resolve((settings,), (), self.registry.plugins, given)

    @cached_property
    def _prompt_file(self) -> Path:
        path, draw = self.folder / "prompts.jsonl", random.Random(SEED)
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        rows = [{"input": "".join(draw.choices(letters, k=self.size.prompt_len))} for _ in range(512)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    async def parts(self) -> Parts:
        """A job's parts, its engine on the trainer's weights. Built once."""
        if self._parts is None:
            resolved = self.resolve("parts")
            _, parts = await build(resolved.config, resolved.registry, Tracking([]), self.stack)
            await parts.weight_sync.push(version=0)
            self._parts = parts
        return self._parts

    async def engine(self) -> RolloutEngine:
        return (await self.parts()).engines[0]

    def groups(self, lengths: Sequence[int], group_size: int = 8) -> list[Group]:
        """Finished samples with made-up tokens, log-probabilities and rewards, as a rollout would bring them."""
        groups: list[Group] = []
        for number, length in enumerate(lengths):
            index, place = divmod(number, group_size)
            if place == 0:
                tokens = self.prompts(1, self.size.prompt_len)[0]
                groups.append(Group(index, Prompt(f"made-up:{index}", "default", text="", tokens=tokens), []))
            sample = Sample.begin(groups[-1].prompt, id=number, group_id=index)
            log_probs = [-5.0] * length
            sample.append(self.prompts(1, length)[0], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: log_probs})
            sample.reward = float(place % 2)
            groups[-1].samples.append(sample)
        return groups


def digits(sample: Sample) -> float:
    """Share of a response's characters that are digits."""
    return sum(char.isdigit() for char in sample.text) / max(len(sample.text), 1)


def byte_tokenizer() -> Any:
    """One token a byte, and one that ends a response."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
