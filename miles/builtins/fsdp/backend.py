"""The train backend `fsdp`: a transformers model that says log-probabilities and learns.

One rank holds a plain module; several shard it with FSDP2 over torch's default process group, which the caller has
initialised. The rest of the package is what this file is made of: `model` (building, sharding, loading), `scorer`
(from tokens to log-probabilities), `attention` (samples end to end that do not see each other), `optimizer`, `state`
(files, offloading), `memory`.

Several ranks must call every method together, with equally many micro-batches (one may be empty). Where one of them
runs out of memory all raise (`keeping_step`), when they are through with their micro-batches, and can try again with
smaller ones. `accumulation` says when they communicate, `ulysses` how several share the tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from miles.api import (
    BackendContext,
    LossFunction,
    MicroBatch,
    Outputs,
    StepReport,
    TrainError,
    TrainPart,
    Want,
    WeightGroup,
)
from miles.builtins.fsdp.accumulation import Accumulation
from miles.builtins.fsdp.attention import WITHOUT_MASK, PackedLayout
from miles.builtins.fsdp.checkpoint import read_state, write_state
from miles.builtins.fsdp.compiled import add_into
from miles.builtins.fsdp.exact_sums import ExactSums
from miles.builtins.fsdp.keeping_step import Ranks
from miles.builtins.fsdp.logits import Head, KeptLogits, Logits, kept_head
from miles.builtins.fsdp.memory import one_out_of_memory_error
from miles.builtins.fsdp.model import COMPUTE_DTYPES, build, copy_into, fill, initial_weights, one_by_one
from miles.builtins.fsdp.optimizer import Optimizer
from miles.builtins.fsdp.state import Presence
from miles.builtins.fsdp.ulysses import ContextGroup, TokenSlice, check_context
from miles.toolkit import move_micro_batch, take_samples

WEIGHTS = ("parameter/", "buffer/")
"""What the names of a model's own numbers begin with, among those of its state."""
LOG_PROBS: frozenset[Want] = frozenset({"log_probs"})


@dataclass(frozen=True)
class Ready:
    """A micro-batch on its device."""

    batch: MicroBatch
    layout: PackedLayout
    part: TokenSlice | None
    """What of it this rank computes; None for all."""


class FsdpBackend:
    """See `miles.protocols.TrainBackend`."""

    sums_gradients = True

    def __init__(self, *, context: BackendContext):
        self.context = context
        self.device = torch.device(context.device)
        together = context.config.train.context_parallel_size
        self.data_rank, self.data_size = context.rank // together, context.world_size // together
        self.dtype = COMPUTE_DTYPES[context.config.train.dtype]
        self.loss_total = torch.zeros((), device=self.device)
        self._gathers = False
        """Layers were compiled for a shared prompt. From then on all micro-batches and padding look like one: keys and
        values are copied for nothing now and then, but compiling takes a rank a quarter of a minute; others wait."""
        check_context(context.config, context.world_size, context.hf_config)
        with one_out_of_memory_error():
            self.built = build(context, _mesh(context))
            self.scorer = self.built.scorer
            self.optimizer = self._make_optimizer()
            self._fill(initial_weights(context, self.scorer))
        self.shares_prompts = not self.scorer.routes  # a balance loss counts tokens, so all of them are computed
        self.presence = Presence(self.scorer, self.optimizer, self.device)
        self.ranks = Ranks(self.scorer, self.device)
        mode = context.config.train.fsdp_reshard if self.optimizer is None or self.optimizer.sums is None else "layer"
        self.accumulation = Accumulation(self.ranks, mode, self.dtype, self.device)
        self.context_group = None if together == 1 else ContextGroup(together, self.ranks.collectives)

    def _make_optimizer(self) -> Optimizer | None:
        trainable = {name: p for name, p in self.scorer.named_parameters() if p.requires_grad}
        if not trainable:
            return None
        sums = None
        if self.context.config.train.reproducible_ranks is not None:
            sums = ExactSums()
            sums.follow(self.scorer)
        add = add_into if self.scorer.compiled else Tensor.add_
        return Optimizer(trainable, self.context.optimizer, self.context.total_steps, sums, add)

    # ------------------------------------------------------------------------------------------------------ numbers

    def forward(self, batches: Sequence[MicroBatch], want: frozenset[Want]) -> list[Outputs]:
        """Without gradient; outputs on the CPU. `logits` may be asked for until the weights change."""
        self.presence.need("parameters")
        heads: list[Head] = []

        def say(ready: Ready) -> Outputs:
            outputs = self._score(ready, want)
            if isinstance(outputs.logits, Logits):
                heads[:] = heads or [kept_head(self.scorer)]
                outputs.logits = KeptLogits(outputs.logits, heads[0])
            return _on_cpu(outputs)

        with self._resharding(), torch.no_grad():
            return self.ranks.work_through(self._ready(batches), say, lambda r: self._accompany(r, want))

    def forward_backward(
        self, batches: Sequence[MicroBatch], loss: LossFunction, want: frozenset[Want] = LOG_PROBS
    ) -> dict[str, Tensor]:
        """Accumulate gradients; `want` says which outputs the loss is given. Router-balance losses, where the model's
        config asks for them, are weighted by the micro-batch's share of the step's tokens."""
        self.presence.need("parameters", "gradients")
        sums: dict[str, Tensor] = {}

        def learn(ready: Ready) -> None:
            outputs = self._score(ready, want, share=ready.batch.bounds[-1] / tokens if tokens else 0.0)
            result = loss(ready.batch, outputs)
            total = sum(outputs.aux_losses.values(), start=result.loss)
            if not ready.batch.bounds[-1]:
                total = total + _sum_of_all(outputs)  # 0: whatever the loss does with no tokens, the ranks keep step
            total.backward()
            self.loss_total += total.detach()
            reported = {f"train/{name}": value.detach() for name, value in outputs.aux_losses.items()}
            for name, value in {**result.sums, **reported}.items():
                sums[name] = sums[name] + value if name in sums else value

        with self._resharding():
            tokens = self._all_tokens(batches)
            ready = self.accumulation.over(self._ready(batches))
            self.ranks.work_through(ready, learn, lambda r: self._accompany(r, want))
        return sums

    def _ready(self, batches: Sequence[MicroBatch]) -> list[Ready]:
        """Copying waits for the device: all that there is to copy is copied before it has work."""
        with self.ranks.agreeing():
            moved = [move_micro_batch(batch, self.device) for batch in batches]
            return [Ready(batch, self._layout(batch), self._slice(batch)) for batch in moved]

    def _layout(self, batch: MicroBatch) -> PackedLayout:
        bounds, shared = self._computed(batch)
        layout = PackedLayout(bounds, self.device, shared, gathers=self._gathers)
        self._gathers = self.scorer.compiled and layout.spans.key_places is not None
        return layout

    def _slice(self, batch: MicroBatch) -> TokenSlice | None:
        return self.context_group.slice_of(*self._computed(batch), self.device) if self.context_group else None

    def _computed(self, batch: MicroBatch) -> tuple[Sequence[int], Sequence[int]]:
        """Bounds of the samples, and what they share. An empty micro-batch becomes padding, so that ranks keep step."""
        tokens = batch.bounds[-1]
        # On CUDA the mask that some kernels need for a continued prompt rules the fastest out: it must be worth it.
        masks = self.device.type == "cuda" and self.built.attention not in WITHOUT_MASK
        worth = not masks or 2 * sum(batch.shared) > tokens
        return (batch.bounds if tokens else [0, self._padding], batch.shared if self.shares_prompts and worth else ())

    @property
    def _padding(self) -> int:
        """Tokens. For one alone torch.compile would compile a layer anew, while others wait, on a rank that perhaps has
        no memory left. Of ranks that share a micro-batch only one token asks for nothing of another's."""
        return 2 if self.context_group is None else 1

    def _score(self, ready: Ready, want: frozenset[Want], share: float = 0.0) -> Outputs:
        """One micro-batch through the model."""
        batch, layout = ready.batch, ready.layout
        tokens = batch.bounds[-1]
        places = torch.arange(self._padding, device=self.device)
        tokens_T, positions_T = (batch.tokens_T, batch.positions_T) if tokens else (places, places)
        with self.context.precision.autocast() if self.context.precision else nullcontext():
            found = self.scorer(tokens_T, positions_T, layout, want, ready.part)
        before_UH = found.pop("before")
        outputs = Outputs(**{f"{name}_T": found[name][:tokens] for name in want if name in found})
        if "logits" in want:
            outputs.logits = Logits(self.scorer, before_UH, layout.tree)
        if "router_balance" in found:
            coefficient = self.scorer.lm.config.router_aux_loss_coef
            outputs.aux_losses["router_balance"] = found["router_balance"] * (coefficient * share)
        return outputs

    def _accompany(self, ready: Ready, want: frozenset[Want]) -> None:
        """Padding in the place of a micro-batch that does not fit: see `keeping_step`."""
        batch = take_samples(ready.batch, 0, 0)
        part = self._slice(batch)
        if part is not None:
            part.stands_for = ready.part
        with self.accumulation.sparing():
            outputs = self._score(Ready(batch, self._layout(batch), part), want)
            if torch.is_grad_enabled():
                _sum_of_all(outputs).backward()

    def _all_tokens(self, batches: Sequence[MicroBatch]) -> int:
        """Tokens of all ranks' micro-batches; 0 where nobody needs to know."""
        if not self.scorer.routes:
            return 0
        return self.ranks.sum(sum(batch.bounds[-1] for batch in batches)) * self.data_size // self.context.world_size

    @contextmanager
    def _resharding(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            self.accumulation.spare()
            raise
        finally:
            self.ranks.reshard()

    # ---------------------------------------------------------------------------------------------------- optimizer

    def optim_step(self) -> StepReport:
        """See the protocol. The gradient is clipped in place: after a failure, start again from `zero_grad`."""
        self.presence.need("parameters", "gradients", "optimizer")
        optimizer = self._learning()
        with self.ranks.agreeing():
            squares = optimizer.measure()
        with one_out_of_memory_error():
            return optimizer.step(self.loss_total, squares)

    def zero_grad(self) -> None:
        self.loss_total.zero_()
        self._learning().zero_grad()

    def _learning(self) -> Optimizer:
        if self.optimizer is None:
            raise TrainError(f"the {self.context.role} model has nothing to train")
        return self.optimizer

    # ------------------------------------------------------------------------------------------------------ weights

    def named_weights(self) -> Iterator[WeightGroup]:
        """Full tensors in the compute dtype, as the model's own forward sees them; gathered one at a time."""
        self.presence.need("parameters")
        weights = one_by_one(self._module_weights())
        yield from self.context.bridge.from_world("torch", self.context.hf_config, weights)

    def take_weights(self, weights: Iterable[WeightGroup]) -> None:
        """See the protocol. The optimizer's moments stay as they are."""
        self.presence.need("parameters", "optimizer")
        self._fill(self.context.bridge.to_world("torch", self.context.hf_config, weights))

    def _fill(self, stream: Iterable[WeightGroup]) -> None:
        fill(self.built, stream, self.optimizer.write if self.optimizer else copy_into)

    def _module_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, slot in self.built.slots.items():
            tensor = slot.tensor.detach()
            lowered = isinstance(slot.tensor, torch.nn.Parameter) and tensor.is_floating_point()
            yield name, tensor.to(self.dtype) if lowered else tensor

    # -------------------------------------------------------------------------------------------------------- state

    def save(self, directory: Path) -> None:
        """Parameters (their masters, where they have some), buffers, moments, steps taken: see `checkpoint`."""
        self.presence.need("parameters", "optimizer")
        directory.mkdir(parents=True, exist_ok=True)
        write_state(directory, self._state(), alone=self.context.world_size == 1)

    def load(self, directory: Path, weights_only: bool = False) -> None:
        """Any number of ranks may have saved it. Raises CheckpointError when it is another model's, or damaged."""
        self.presence.need("parameters", "optimizer")
        prefix = WEIGHTS if weights_only else ("",)
        state = {name: tensor for name, tensor in self._state().items() if name.startswith(prefix)}
        # What is not trained is bf16 in a model of one rank, and float32 in a sharded one, which rounds as it gathers.
        frozen = {f"parameter/{name}" for name, p in self.scorer.named_parameters() if not p.requires_grad}
        read_state(directory, state, alone=self.context.world_size == 1, prefix=prefix, rounded=frozen)
        if self.optimizer:
            self.optimizer.round_masters()

    def _state(self) -> dict[str, Tensor]:
        """By names, in dtypes and shapes that do not depend on the number of ranks."""
        kept = self.optimizer.tensors() if self.optimizer else {}
        held = {f"parameter/{name}": parameter for name, parameter in self.scorer.named_parameters()}
        names = set(self.scorer.state_dict())
        buffers = {f"buffer/{n}": b for n, b in self.scorer.named_buffers() if n in names}
        return {**held, **buffers, **kept}

    def offload(self, parts: frozenset[TrainPart]) -> None:
        self.presence.offload(parts)

    def onload(self, parts: frozenset[TrainPart]) -> None:
        self.presence.onload(parts)


def _on_cpu(outputs: Outputs) -> Outputs:
    quantities = {name: getattr(outputs, name) for name in ("log_probs_T", "entropy_T", "values_T")}
    there = {name: None if values_T is None else values_T.cpu() for name, values_T in quantities.items()}
    losses = {name: value.cpu() for name, value in outputs.aux_losses.items()}
    return replace(outputs, **there, aux_losses=losses)


def _sum_of_all(outputs: Outputs) -> Tensor:
    """Of a micro-batch without tokens: 0, with a gradient of 0 for every parameter."""
    parts = [outputs.log_probs_T, outputs.entropy_T, outputs.values_T, *outputs.aux_losses.values()]
    parts += [outputs.logits(0, 0)] if outputs.logits else []
    return torch.stack([part.sum() for part in parts if part is not None]).sum()


def _mesh(context: BackendContext) -> DeviceMesh | None:
    if context.world_size == 1:
        return None
    if not dist.is_initialized() or dist.get_world_size() != context.world_size:
        raise TrainError(
            f"backend `fsdp` on {context.world_size} ranks needs torch.distributed's default process group of that "
            "size; the executor initialises it"
        )
    return init_device_mesh(torch.device(context.device).type, (context.world_size,))
