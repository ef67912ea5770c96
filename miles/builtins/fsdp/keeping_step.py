"""Ranks that share a model's parameters keep step, also when one of them runs out of memory.

What FSDP2 communicates in the course of a micro-batch is a fixed sequence, the same on all ranks whatever their samples
are. A rank that fell out in the middle of it would leave the others waiting for ever. Instead it lets go of all that it
holds and accompanies them with a token or two of padding, as it does for an empty micro-batch of its share: that runs
through the same sequence, of which it leaves out what it had taken part in already. What it adds is worth nothing, and
neither is what it accompanied: when the last micro-batch is over the ranks tell each other, and all of them raise.
Where the others keep the whole model until the end of the step it does not: two units at a time are all that it needs.

    this rank     gather 0, gather 1, out of memory | (0), (1), gather 2, reduce 2, reduce 1, reduce 0 | agree, raise
    the others    gather 0, gather 1, gather 2, reduce 2, reduce 1, reduce 0                           | agree, raise
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from miles.api import MicroBatch, TrainError
from miles.builtins.fsdp.memory import OutOfMemoryOnRank, one_out_of_memory_error


class Piece(Protocol):
    """Of the work of a phase."""

    @property
    def batch(self) -> MicroBatch: ...


T = TypeVar("T")
P = TypeVar("P", bound=Piece)
RANKS = 1 << 20
"""More than there are."""
# torch 2.13 has new names for these two
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """What one rank communicates within a micro-batch, in order."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        """By kind, since the beginning."""
        self._done = Counter[tuple[str, object]]()
        """Of this micro-batch's sequence, by kind and unit. The first so many of each are the sequence's beginning."""
        self._left_out = Counter[tuple[str, object]]()
        self._whole: set[object] = set()
        self._reduces: bool | None = None

    def begin(self) -> None:
        self._done.clear()
        self._left_out.clear()

    def again(self, gathered: Iterable[object]) -> None:
        """The sequence comes once more, and what was done of it is left out, as is the first gathering of the units
        that were `gathered` when it began: the others have them, so gather them no more."""
        self._left_out = self._done + Counter(("gather", unit) for unit in gathered)
        self._done = Counter()
        self._whole = {unit for kind, unit in self._left_out if kind == "gather"}

    @contextmanager
    def once_a_step(self, reduces: bool) -> Iterator[None]:
        """After `again`: this rank gathers its units and frees them as often as it likes, while the others gather each
        once, keep it to the end of the step, and reduce it only where all `reduces`."""
        self._reduces = reduces
        try:
            yield
        finally:
            self._reduces = None

    def take_part(self, kind: str, communicate: Callable[[], T], unit: object = None) -> tuple[bool, T | None]:
        """Communicates, or says that it was left out: nothing came."""
        if self._leaves_out(kind, unit):
            return False, None
        work = communicate()
        self._done[kind, unit] += 1
        self.counts[kind] += 1
        return True, work

    def _leaves_out(self, kind: str, unit: object) -> bool:
        if self._reduces is not None and kind == "gather":
            known = unit in self._whole
            self._whole.add(unit)
            return known
        if self._reduces is False and kind == "reduce":
            return True
        left = self._left_out[kind, unit]
        self._left_out[kind, unit] = max(left - 1, 0)
        return left > 0


class _Communication:
    """FSDP2's own, which `Collectives` hears of."""

    def __init__(self, collectives: Collectives, unit: Unit):
        self.collectives = collectives
        self.unit = unit

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Communication):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        def communicate() -> Any:
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)

        took_part, work = self.collectives.take_part("gather", communicate, self.unit)
        if not took_part:
            output_tensor.zero_()
        return work


class _Reduce(_Communication):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        def communicate() -> Any:
            return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)

        took_part, work = self.collectives.take_part("reduce", communicate, self.unit)
        if not took_part:
            output_tensor.zero_()
        return work


def sharded_together(module: nn.Module) -> list[list[Any]]:
    """The modules of each unit of FSDP2's, units in the order of the model."""
    found: dict[int, list[Any]] = {}
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            found.setdefault(id(inner._get_fsdp_state()), []).append(inner)
    return list(found.values())


class Unit:
    """A module, the first of several perhaps, whose parameters FSDP2 gathers and reduces together."""

    def __init__(self, module: FSDPModule):
        self.module = module
        self._holder, self._name = _own_parameter(module)

    @property
    def gathered(self) -> bool:
        return not isinstance(getattr(self._holder, self._name), DTensor)


def _own_parameter(module: Any) -> tuple[nn.Module, str]:
    """Where a parameter lives that belongs to no unit further in."""
    inner: list[nn.Module] = [module]
    while inner:
        found = inner.pop()
        for name, _ in found.named_parameters(recurse=False):
            return found, name
        inner += [child for child in found.children() if not isinstance(child, FSDPModule)]
    raise TrainError(f"{type(module).__name__} has no parameters of its own to shard")


class Ranks:
    """The ranks of a model, as one of them sees it. A single rank has nobody to agree with.

    Args:
        module: sharded by FSDP2, or plain.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module
        self.collectives = Collectives()
        self.several = isinstance(module, FSDPModule)
        self.units = [Unit(members[0]) for members in sharded_together(module)]
        for unit in self.units:
            unit.module.set_custom_all_gather(_Gather(self.collectives, unit))  # type: ignore[arg-type]
            unit.module.set_custom_reduce_scatter(_Reduce(self.collectives, unit))  # type: ignore[arg-type]
        self._word = torch.zeros((), dtype=torch.int64, device=device)  # when it is needed there may be no memory

    def sum(self, number: int) -> int:
        """Over all ranks."""
        self._word.fill_(number)
        if self.several:
            dist.all_reduce(self._word)
        return int(self._word)

    def work_through(
        self,
        pieces: Iterable[P],
        work: Callable[[P], T],
        accompany: Callable[[P], object],
    ) -> list[T]:
        """What `work` makes of each micro-batch.

        Args:
            accompany: with next to no memory, communicates exactly as `work` does.

        Raises:
            torch.OutOfMemoryError: on some rank a micro-batch did not fit; on all ranks alike. The module can be used.
            TrainError: what is left of the memory does not even do for padding.
        """
        if not self.several:
            with one_out_of_memory_error():
                return [work(piece) for piece in pieces]
        done: list[T] = []
        fallen: MicroBatch | None = None
        for piece in pieces:
            self.collectives.begin()
            if fallen is None:
                gathered = [unit for unit in self.units if unit.gathered]
                if self._fits(lambda piece=piece: done.append(work(piece))):  # type: ignore[misc]
                    continue
                fallen = piece.batch
                done.clear()
                self.recover()
                gc.collect()
                if self._word.is_cuda:
                    torch.cuda.empty_cache()
                self.collectives.again(gathered)
            if not self._fits(lambda piece=piece: accompany(piece)):  # type: ignore[misc]
                raise TrainError(
                    f"rank {dist.get_rank()} ran out of memory, and has too little left to see the other ranks through "
                    "what they are at. Lower --max-tokens-per-gpu, or use more ranks."
                )
        self._agree(fallen)
        return done

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Around what needs memory but communicates nothing: does it, or raises, on all ranks alike."""
        error = None
        try:
            with one_out_of_memory_error():
                yield
        except torch.OutOfMemoryError as caught:
            if not self.several:
                raise
            error = caught.with_traceback(None)
        self._agree(error)

    def _fits(self, act: Callable[[], object]) -> bool:
        try:
            with one_out_of_memory_error():
                act()
        except torch.OutOfMemoryError:
            return False
        return True

    def _agree(self, fallen: MicroBatch | torch.OutOfMemoryError | None) -> None:
        """All ranks hear of a rank that has fallen out: of one where nothing can be split any more, before others."""
        if not self.several:
            return
        rank = dist.get_rank()
        if fallen is None:
            self._word.zero_()
        else:
            samples, tokens = (len(fallen), fallen.bounds[-1]) if isinstance(fallen, MicroBatch) else (2, 0)
            self._word.fill_((samples < 2) * RANKS**3 + min(tokens, RANKS**2 - 1) * RANKS + rank + 1)
        dist.all_reduce(self._word, dist.ReduceOp.MAX)
        if word := int(self._word):
            self.recover()
            raise OutOfMemoryOnRank(word % RANKS - 1, alone=word >= RANKS**3, tokens=word // RANKS % RANKS**2)

    def recover(self) -> None:
        """Ready for the next forward, whatever happened; gradients are worthless."""
        if isinstance(self.module, FSDPModule):
            forget_iteration(self.module)

    def reshard(self) -> None:
        """Some units stay gathered after a forward that no backward follows."""
        for unit in self.units:
            unit.module.reshard()


def forget_iteration(root: FSDPModule) -> None:
    """Make a sharded module usable after an exception in the middle of forward or backward.

    torch's own `reset_iter_state` (from 2.13) leaves gradients that were not reduced yet, and the next backward would
    add to them; nor can it be called before the first forward. Older versions have nothing, so that it is done here.
    """
    state: Any = root._get_fsdp_state()
    modules: Any = root
    for module in modules.modules():
        for group in _groups(module._get_fsdp_state()) if isinstance(module, FSDPModule) else ():
            for sharded in group.fsdp_params:
                sharded.unsharded_accumulated_grad = None
                if hasattr(sharded, "_unsharded_param"):
                    sharded._unsharded_param.grad = None
    if state._is_root is None:
        return
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
    else:
        _reset_old_state(state)


def _groups(state: Any) -> list[Any]:
    """Its parameters; torch 2.11 knows one group of them at most."""
    found = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in found if group is not None]


def _reset_old_state(root: Any) -> None:
    """As `reset_iter_state` does, for a torch without it."""
    if root._device.type == "cuda":
        torch.cuda.synchronize(root._device)
    shared, communication = root._state_ctx, root._comm_ctx
    shared.iter_forward_root = None
    shared.post_backward_final_callback_queued = False
    communication.all_gather_state = communication.reduce_scatter_state = None
    getattr(communication, "reduce_scatter_states", []).clear()  # torch 2.12 has several
    communication.post_forward_order.clear()
    for state in shared.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = type(state._training_state).IDLE
        for group in _groups(state):
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = type(group._training_state).IDLE
            group._to_sharded()
