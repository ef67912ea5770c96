"""One model's tensors under many names: a list of invertible ops, read in two directions.

A model family says once how each tensor of its checkpoints is held in each *world* (the transformers module, an engine,
Megatron ...): under which name, and put together from which checkpoint tensors by which ops. Each `Weight` in the list
also knows its layer, its expert, the dimension along which tensor parallelism cuts it and the pipeline stage it lives
on. Everything else follows from the list: loading, exporting, and both for the part of the model that one rank holds.

    Weight((q, k, v), {"decoder": Form("layers.{i}.qkv.weight", Concat((8, 2, 2)))}, dim=COLUMN, layers=range(28))

reads: in the world `decoder` layer i holds one tensor, 8 parts of query rows, then 2 of key rows, then 2 of value rows.

Why tensor parallelism needs no code of its own: checkpoint tensors are cut *before* the ops fuse them, so a rank's
fused tensor is the fusion of its pieces, `[gate_r; up_r]`, and on the way back each piece is a plain slice of a
checkpoint tensor again. A world whose names are the checkpoint's (`hf`, and `torch` unless listed) needs no form.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from miles.errors import ConfigError, WeightError
from miles.parts import WHOLE, Part, Sharding
from miles.types import WeightGroup

COLUMN = 0
"""A matrix `[out, in]` (or a vector `[out]`) whose outputs are divided."""
ROW = 1
"""A matrix `[out, in]` whose inputs are divided."""
PLAIN_WORLDS = ("hf", "torch")
"""Worlds that use the checkpoint's own names and shapes wherever a `Weight` does not say otherwise."""

# ---------------------------------------------------------------------------------------------------------------- ops


class Op(Protocol):
    """Some tensors in, others out, nothing lost. `shards` is the number of tensor-parallel pieces they are cut in."""

    def forward(self, tensors: list[Tensor], shards: int) -> list[Tensor]: ...

    def inverse(self, tensors: list[Tensor], shards: int) -> list[Tensor]: ...


@dataclass(frozen=True)
class Concat:
    """Every `len(ratio)` tensors become one, along dimension 0; `ratio` is how their rows compare.

    With `groups` the rows are interleaved: first the first group's rows of each tensor, then the second group's.
    Megatron's fused attention is `Concat((heads, kv_heads, kv_heads), groups=kv_heads)`.
    """

    ratio: tuple[int, ...]
    groups: int | None = None

    def forward(self, tensors: list[Tensor], shards: int) -> list[Tensor]:
        groups = self._groups(shards)
        width = len(self.ratio)
        fused = []
        for start in range(0, len(tensors), width):
            parts = tensors[start : start + width]
            rows = [part.shape[0] for part in parts]
            if any(a * self.ratio[0] != b * rows[0] for a, b in zip(rows, self.ratio, strict=True)) or rows[0] % groups:
                raise WeightError(f"rows {rows} do not compare as {self.ratio} in {groups} groups")
            cut = [part.unflatten(0, (groups, -1)) for part in parts]
            fused.append(torch.cat(cut, dim=1).flatten(0, 1))
        return fused

    def inverse(self, tensors: list[Tensor], shards: int) -> list[Tensor]:
        groups = self._groups(shards)
        unit = sum(self.ratio)
        parts: list[Tensor] = []
        for tensor in tensors:
            rows, rest = divmod(tensor.shape[0], groups)
            if rest or any(rows * share % unit for share in self.ratio):
                raise WeightError(f"{tensor.shape[0]} rows cannot be split as {self.ratio} in {groups} groups")
            sizes = [rows * share // unit for share in self.ratio]
            parts += [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(sizes, dim=1)]
        return parts

    def _groups(self, shards: int) -> int:
        if self.groups is None:
            return 1
        if self.groups % shards:
            raise WeightError(f"{self.groups} key-value groups cannot be divided among {shards} tensor-parallel ranks")
        return self.groups // shards


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape become one, along a new dimension 0: the experts of a layer."""

    def forward(self, tensors: list[Tensor], shards: int) -> list[Tensor]:
        return [torch.stack(tensors)]

    def inverse(self, tensors: list[Tensor], shards: int) -> list[Tensor]:
        return list(tensors[0].unbind(0))


@dataclass(frozen=True)
class Inverse:
    """Another op read backwards: `Inverse(Concat((2, 1)))` splits a tensor that a checkpoint keeps fused."""

    op: Op

    def forward(self, tensors: list[Tensor], shards: int) -> list[Tensor]:
        return self.op.inverse(tensors, shards)

    def inverse(self, tensors: list[Tensor], shards: int) -> list[Tensor]:
        return self.op.forward(tensors, shards)


# ------------------------------------------------------------------------------------------------------------- the list


class Form:
    """How a world holds a `Weight`: under these names, made from the checkpoint's tensors by `ops`, in their order."""

    def __init__(self, names: str | tuple[str, ...], *ops: Op):
        self.names = (names,) if isinstance(names, str) else names
        self.ops = ops


@dataclass(frozen=True)
class Conversion:
    """One `Weight` in one layer (and one expert, unless stacked), with the names filled in."""

    weight: Weight
    form: Form
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """Checkpoint tensors that belong together, and their form in each world. `{i}` is the layer, `{e}` the expert.

    An expert's weight whose form has no `{e}` in its names covers all experts of a layer, tensors ordered by expert.
    """

    hf: tuple[str, ...]
    """They reach an engine together."""
    worlds: Mapping[str, Form]
    dim: int | None = None
    """Dimension along which tensor parallelism cuts each checkpoint tensor: `COLUMN`, `ROW` or none."""
    layers: Sequence[int] | None = None
    """Layers that have it; None outside the layers."""
    experts: int = 0
    stage: Literal["first", "last", "last_apart"] = "first"
    """Outside the layers: the pipeline stage that holds it. `last_apart` is the last unless it is also the first."""
    copy: bool = False
    """A second copy of tensors that another entry owns: filled on the way in, ignored on the way back."""
    rows: int | None = None
    """Rows of the checkpoint's tensor where a world may pad it."""

    @property
    def sharding(self) -> Sharding:
        return Sharding(self.dim, bool(self.experts), self.rows)

    def form(self, world: str) -> Form | None:
        """None where the world does not hold it."""
        if world in self.worlds:
            return self.worlds[world]
        return Form(self.hf) if world in PLAIN_WORLDS and not self.copy else None

    def conversions(self, world: str, part: Part, num_layers: int) -> Iterator[Conversion]:
        """What `part` of the world holds of this weight."""
        form = self.form(world)
        stage = part.layers if part.layers is not None else range(num_layers)
        if form is None or (self.layers is None and not self._on(stage, num_layers)):
            return
        held = part.experts if part.experts is not None else range(self.experts)
        stacked = "{e}" in self.hf[0] and "{e}" not in form.names[0]
        units: list[Sequence[int]] = [[0]]
        if self.experts:
            units = [held] if stacked else [[e] for e in held]
        for i in [0] if self.layers is None else [i for i in self.layers if i in stage]:
            for experts in units:
                sources = tuple(name.format(i=i, e=e) for e in experts for name in self.hf)
                local = {"i": i - stage.start, "e": experts[0] - held.start}
                yield Conversion(self, form, sources, tuple(name.format(**local) for name in form.names))

    def _on(self, stage: range, num_layers: int) -> bool:
        first, last = 0 in stage, num_layers - 1 in stage
        return {"first": first, "last": last, "last_apart": last and not first}[self.stage]


# ---------------------------------------------------------------------------------------------- tensor-parallel pieces


def cut_shard(tensor: Tensor, sharding: Sharding, part: Part) -> Tensor:
    """The piece of a whole checkpoint tensor that `part` holds: a view, unless rows had to be padded."""
    if sharding.rows is not None and part.vocab_rows is not None:
        padding = tensor.new_zeros(part.vocab_rows - tensor.shape[0], *tensor.shape[1:])
        tensor = torch.cat([tensor, padding])
    share = part.expert_tensor if sharding.expert else part.tensor
    if sharding.dim is None or share.size == 1:
        return tensor
    length, rest = divmod(tensor.shape[sharding.dim], share.size)
    if rest:
        raise WeightError(f"shape {list(tensor.shape)} cannot be cut in {share.size} along dimension {sharding.dim}")
    return tensor.narrow(sharding.dim, share.rank * length, length)


def join_shards(shards: Sequence[Tensor], sharding: Sharding) -> Tensor:
    """The whole checkpoint tensor out of the pieces of all tensor-parallel ranks, in their order."""
    whole = shards[0] if sharding.dim is None or len(shards) == 1 else torch.cat(list(shards), sharding.dim)
    return whole if sharding.rows is None else whole[: sharding.rows]


# ----------------------------------------------------------------------------------------------------------- streaming


@dataclass
class _Job:
    """Waits for its inputs, then runs once."""

    inputs: tuple[str, ...]
    run: Callable[[list[Tensor]], list[WeightGroup]]
    arrived: dict[str, Tensor] = field(default_factory=dict)

    def finish(self) -> list[WeightGroup]:
        tensors = [self.arrived[name] for name in self.inputs]
        self.arrived.clear()
        try:
            return self.run(tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(self.inputs[:4], tensors, strict=False))
            raise WeightError(f"{shapes}{' ...' if len(tensors) > 4 else ''}: {error}") from error


def _stream(jobs: Iterable[_Job], groups: Iterable[WeightGroup], others: set[str], where: str) -> Iterator[WeightGroup]:
    """Run each job as soon as its last input arrived. `others` are names that may come and are not wanted."""
    waiting: dict[str, list[_Job]] = {}
    for job in jobs:
        for name in job.inputs:
            waiting.setdefault(name, []).append(job)
    known = others | set(waiting)
    seen: set[str] = set()
    for group in groups:
        for name, tensor in group.items():
            if name not in known:
                guess = get_close_matches(name, known, n=1)
                hint = f"; the closest known is {guess[0]!r}" if guess else ""
                raise WeightError(f"unknown tensor {name!r} in {where}{hint}")
            if name in seen:
                raise WeightError(f"tensor {name!r} came twice in {where}")
            seen.add(name)
            for job in waiting.pop(name, ()):
                job.arrived[name] = tensor
                if len(job.arrived) == len(job.inputs):
                    yield from job.finish()
    if waiting:
        names = ", ".join(sorted(waiting)[:8]) + (" ..." if len(waiting) > 8 else "")
        raise WeightError(f"{len(waiting)} tensors are missing in {where}: {names}")


# ---------------------------------------------------------------------------------------------------------- the bridge


class OpBridge(ABC):
    """The `Bridge` of a family that is a list of `Weight`s: give `weights` and `config_for`, the rest falls out.

    Input tensors are held until the rest of their group has come, and are not copied before.
    """

    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    """Patterns of checkpoint tensors that say nothing: buffers that older checkpoints kept."""
    _shardings: tuple[Any, dict[str, Sharding]] | None = None
    """Of the config last asked for: an export asks once a tensor."""

    @abstractmethod
    def weights(self, hf_config: Any) -> Sequence[Weight]:
        """The list."""

    def copies(self, hf_config: Any) -> Mapping[str, str]:
        """Checkpoint tensors that repeat another one if they are there: a tied head, usually."""
        return {}

    def config_for(self, world: str, hf_config: Any) -> Mapping[str, Any]:
        if world in PLAIN_WORLDS:
            return hf_config.to_dict()
        raise self._unknown_world(world, hf_config)

    def sharding(self, hf_config: Any, name: str) -> Sharding:
        if self._shardings is None or self._shardings[0] is not hf_config:
            weights = self.weights(hf_config)
            by_pattern = {known.format(i="*", e="*"): weight.sharding for weight in weights for known in weight.hf}
            self._shardings = (hf_config, by_pattern)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if pattern not in self._shardings[1]:
            raise WeightError(f"unknown tensor {name!r} in a checkpoint of {hf_config.model_type!r}")
        return self._shardings[1][pattern]

    def to_world(
        self, world: str, hf_config: Any, groups: Iterable[WeightGroup], part: Part = WHOLE
    ) -> Iterator[WeightGroup]:
        conversions = self._conversions(world, hf_config, part)
        others = {name for c in self._conversions("hf", hf_config, WHOLE) for name in c.sources}
        jobs = (_Job(c.sources, partial(_fuse, c, part)) for c in conversions)
        where = f"a checkpoint of {hf_config.model_type!r}"
        yield from _stream(jobs, self._without_copies(hf_config, groups), others, where)

    def from_world(
        self, world: str, hf_config: Any, groups: Iterable[WeightGroup], part: Part = WHOLE
    ) -> Iterator[WeightGroup]:
        conversions = self._conversions(world, hf_config, part)
        copies = {name for c in conversions if c.weight.copy for name in c.targets}
        jobs = (_Job(c.targets, partial(_split, c, part)) for c in conversions if not c.weight.copy)
        yield from _stream(jobs, groups, copies, f"the {world!r} tensors of {hf_config.model_type!r}")

    def _conversions(self, world: str, hf_config: Any, part: Part) -> list[Conversion]:
        layers = hf_config.num_hidden_layers
        found = [c for weight in self.weights(hf_config) for c in weight.conversions(world, part, layers)]
        if not found:
            raise self._unknown_world(world, hf_config)
        return found

    def _unknown_world(self, world: str, hf_config: Any) -> ConfigError:
        worlds = {name for weight in self.weights(hf_config) for name in weight.worlds} | set(PLAIN_WORLDS)
        return ConfigError(
            f"{type(self).__name__} does not know how {world!r} names the tensors of a {hf_config.model_type!r} model; "
            f"it knows {', '.join(sorted(worlds))}"
        )

    def _without_copies(self, hf_config: Any, groups: Iterable[WeightGroup]) -> Iterator[WeightGroup]:
        """Leave out what says nothing, and copies, after making sure that they are copies."""
        copies = self.copies(hf_config)
        originals = set(copies.values())
        seen: dict[str, Tensor] = {}
        for group in groups:
            seen |= {name: tensor for name, tensor in group.items() if name in copies or name in originals}
            for copy, original in copies.items():
                if copy in seen and original in seen and not torch.equal(seen.pop(copy), seen[original]):
                    raise WeightError(
                        f"{copy!r} differs from {original!r}, which the config says it is tied to; "
                        "set tie_word_embeddings to false in the checkpoint's config.json if both are meant"
                    )
            yield {
                name: tensor
                for name, tensor in group.items()
                if name not in copies and not any(re.fullmatch(pattern, name) for pattern in self.ignored)
            }


def _fuse(conversion: Conversion, part: Part, tensors: list[Tensor]) -> list[WeightGroup]:
    sharding = conversion.weight.sharding
    tensors = [cut_shard(tensor, sharding, part) for tensor in tensors]
    for op in conversion.form.ops:
        tensors = op.forward(tensors, _shards(sharding, part))
    return [dict(zip(conversion.targets, tensors, strict=True))]


def _split(conversion: Conversion, part: Part, tensors: list[Tensor]) -> list[WeightGroup]:
    """One group for each set of tensors that belong together: a stack of experts yields one for each expert."""
    for op in reversed(conversion.form.ops):
        tensors = op.inverse(tensors, _shards(conversion.weight.sharding, part))
    named = list(zip(conversion.sources, tensors, strict=True))
    size = len(conversion.weight.hf)
    return [dict(named[start : start + size]) for start in range(0, len(named), size)]


def _shards(sharding: Sharding, part: Part) -> int:
    if sharding.dim is None:
        return 1
    return (part.expert_tensor if sharding.expert else part.tensor).size
