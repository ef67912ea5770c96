"""What the tests of memory running out, and of what is communicated, run on each rank."""

from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from fsdp2_rank import loss, make_backend, same, step, weights
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miles.builtins.fsdp.memory import OutOfMemoryOnRank
from miles.builtins.fsdp.model import local
from miles.config import Config
from miles.training.packing import build_micro_batch
from miles.training.table import Table
from miles.training.worker import TrainWorker
from miles.types import LossResult

LAST = -1
NOWHERE = ("nowhere", 0, 0)
SCENARIOS = {
    # name: (case, changes of the configuration, {rank: (where, layer, which time)})
    "forward, first micro-batch": ("dense", {}, {0: ("forward", 0, 1)}),
    "forward, second micro-batch": ("dense", {}, {1: ("forward", 1, 2)}),
    "the last rank": ("dense", {}, {LAST: ("forward", 1, 1)}),
    "backward, first micro-batch": ("dense", {}, {1: ("backward", 1, 1)}),
    "backward, second micro-batch": ("dense", {}, {0: ("backward", 0, 2)}),
    "both at different places": ("dense", {}, {0: ("forward", 1, 1), 1: ("backward", 0, 2)}),
    "both, forward and forward": ("dense", {}, {0: ("forward", 1, 1), 1: ("forward", 0, 1)}),
    "before anything": ("dense", {}, {1: ("ready", 0, 1)}),
    "the loss": ("dense", {}, {0: ("loss", 0, 1)}),
    "optimizer": ("dense", {}, {1: ("measure", 0, 1)}),
    "step: forward": ("dense", {"fsdp_reshard": "step"}, {0: ("forward", 1, 1)}),
    "step: forward, second micro-batch": ("dense", {"fsdp_reshard": "step"}, {1: ("forward", 0, 2)}),
    "step: backward": ("dense", {"fsdp_reshard": "step"}, {1: ("backward", 0, 1)}),
    "step: backward, second micro-batch": ("dense", {"fsdp_reshard": "step"}, {1: ("backward", 1, 2)}),
    "step: both, different places": ("dense", {"fsdp_reshard": "step"}, {0: ("forward", 1, 1), 1: ("backward", 0, 2)}),
    "checkpointing: forward": ("dense", {"gradient_checkpointing": True}, {0: ("forward", 1, 1)}),
    "checkpointing: recomputation": ("dense", {"gradient_checkpointing": True}, {1: ("forward", 0, 2)}),
    "checkpointing: backward": ("dense", {"gradient_checkpointing": True}, {1: ("backward", 1, 1)}),
    "bf16: backward": ("bf16", {"fsdp_reshard": "layer"}, {1: ("backward", 0, 1)}),
    "bf16, step: backward": ("bf16", {}, {1: ("backward", 0, 2)}),
    "grouped: forward": ("grouped", {"gradient_checkpointing": False}, {0: ("forward", 1, 1)}),
    "grouped: recomputation": ("grouped", {}, {1: ("forward", 3, 2)}),
    "grouped: backward": ("grouped", {}, {1: ("backward", 4, 1)}),
    "grouped, step: backward": ("grouped by step", {}, {1: ("backward", 1, 2)}),
    "moe: backward": ("moe", {}, {0: ("backward", 1, 1)}),
    "critic: backward": ("critic", {"fsdp_reshard": "layer"}, {0: ("backward", 1, 1)}),
    "critic: forward": ("critic", {"fsdp_reshard": "layer"}, {1: ("forward", 1, 2)}),
    "critic, step: backward": ("critic", {}, {1: ("backward", 0, 1)}),
    "old torch": ("dense", {}, {0: ("backward", 0, 1)}),
}
"""Where memory runs out in the middle of an optimizer step."""


SHARES = ([[0, 1], [2]], [[3], [4, 5]])
"""Of even ranks and of odd ones: micro-batches -> samples."""
LENGTHS = (9, 4, 12, 5, 7, 11)


def make_batches(rank: int) -> list:
    generator = np.random.default_rng(1)
    samples = [generator.integers(0, 37, length) for length in LENGTHS]
    columns = {"weights": [generator.random(length, dtype=np.float32) / 10 for length in LENGTHS]}
    return [build_micro_batch(rows, samples, columns) for rows in SHARES[rank % 2]]


@contextmanager
def failing(backend, where: str, layer: int, time: int):
    """Runs out of memory the `time`-th time that it comes to a place."""
    came = []

    def fail(*args):
        came.append(where)
        if len(came) == time:
            raise torch.OutOfMemoryError("injected")

    module = backend.scorer.lm.model.layers[layer].mlp
    handles, patched = [], []
    if where == "forward":
        handles.append(module.register_forward_pre_hook(fail))
    elif where == "backward":
        handles.append(module.register_forward_hook(lambda m, i, output: output.register_hook(fail) and None))
    elif where in ("ready", "measure"):
        owner, name = (backend, "_layout") if where == "ready" else (backend.optimizer, "measure")
        original = getattr(owner, name)
        patched.append((owner, name))
        setattr(owner, name, lambda *args: (fail(), original(*args))[1])
    try:
        yield (lambda batch, outputs: (fail(), loss(batch, outputs))[1]) if where == "loss" else loss
    finally:
        for handle in handles:
            handle.remove()
        for owner, name in patched:
            delattr(owner, name)


@contextmanager
def older_torch():
    """Where FSDP2 cannot be reset."""
    reset = getattr(FSDPModule, "reset_iter_state", None)
    if reset is not None:
        del FSDPModule.reset_iter_state
    yield
    if reset is not None:
        FSDPModule.reset_iter_state = reset


@cache
def ready(case: str, changes: tuple, rank: int, size: int) -> tuple:
    """A backend, its state after one step, and the weights after another that nothing disturbs."""
    backend, batches = make_backend(case, rank, size, **dict(changes)), make_batches(rank)
    step(backend, batches)
    state = {name: local(tensor.detach()).clone() for name, tensor in backend._state().items()}
    step(backend, batches)
    return backend, state, weights(backend)


def play(name: str, rank: int, size: int) -> dict:
    """A scenario, in the second step."""
    case, changes, failures = SCENARIOS[name]
    backend, state, expected = ready(case, tuple(changes.items()), rank, size)
    batches = make_batches(rank)
    with torch.no_grad():
        for key, tensor in backend._state().items():
            local(tensor).copy_(state[key])
    mine = failures.get(rank, failures.get(LAST) if rank == size - 1 else None)
    facts = {"raised": False}
    wanted = frozenset({"values" if case == "critic" else "log_probs"})
    with older_torch() if name == "old torch" else nullcontext():
        with failing(backend, *(mine or NOWHERE)) as its_loss:
            try:
                backend.zero_grad()
                backend.forward_backward(batches, its_loss, wanted)
                backend.optim_step()
            except OutOfMemoryOnRank as error:
                facts = {"raised": True, "rank": error.rank, "alone": error.alone, "tokens": error.tokens}
        facts["sharded"] = all(not unit.gathered for unit in backend.ranks.units)
        step(backend, batches)
    facts["same"] = same(expected, weights(backend))
    return facts


def log_probs(rank: int, size: int) -> dict:
    """The second of three micro-batches does not fit on one rank."""
    found = {}
    for mode in ("layer", "step"):
        backend = make_backend("dense", rank, size, fsdp_reshard=mode)
        batches = make_batches(rank)[:1] * 3
        wanted = frozenset({"log_probs", "entropy"})
        calm = backend.forward(batches, wanted)
        with failing(backend, *(("forward", 1, 2) if rank == 1 else NOWHERE)):
            try:
                backend.forward(batches, wanted)
                found[mode] = False
            except OutOfMemoryOnRank as error:
                again = backend.forward(batches, wanted)
                equal = [torch.equal(a.log_probs_T, b.log_probs_T) for a, b in zip(calm, again, strict=True)]
                found[mode] = error.rank == 1 and all(equal)
    return found


def first_of_all(rank: int, size: int) -> bool:
    """Memory runs out before the model has ever worked."""
    backend, batches = make_backend("dense", rank, size), make_batches(rank)
    with failing(backend, *(("forward", 0, 1) if rank == 0 else NOWHERE)):
        try:
            step(backend, batches)
        except OutOfMemoryOnRank:
            return not step(backend, batches)[0].skipped
    return False


def counted(rank: int, size: int) -> dict:
    """Collectives of one optimizer step of one, and of three micro-batches."""
    found = {}
    for mode in ("layer", "step"):
        backend = make_backend("dense", rank, size, fsdp_reshard=mode)
        for count in (1, 3):
            before = backend.ranks.collectives.counts.copy()
            step(backend, make_batches(rank)[:1] * count)
            found[f"{mode}-{count}"] = dict(backend.ranks.collectives.counts - before)
        found[f"{mode}-units"] = len(backend.ranks.units)
        found[f"{mode}-weights"] = {name: w.double().flatten().tolist() for name, w in weights(backend).items()}
    return found


def adapts(rank: int, size: int) -> list[bool]:
    """`auto` gathers once a step where that fits, until memory runs out somewhere."""
    backend, batches = make_backend("dense", rank, size, fsdp_reshard="auto"), make_batches(rank)
    seen = [backend.accumulation.by_step]
    with failing(backend, *(("backward", 0, 1) if rank == 1 else NOWHERE)):
        try:
            step(backend, batches)
        except OutOfMemoryOnRank:
            seen.append(backend.accumulation.by_step)
    before = backend.ranks.collectives.counts.copy()
    step(backend, batches[:1])
    return [*seen, (backend.ranks.collectives.counts - before)["gather"] > len(backend.ranks.units)]


class Made(TorchDispatchMode):
    """Memory that operations took, without keeping it."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.took = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [storage._cdata for storage in storages((args, kwargs))]
        for storage in storages(result):
            if storage._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage)
                self.took += storage.nbytes()
        return result

    def left(self, backend) -> int:
        """Bytes that are still held, but for this rank's part of the gradients."""
        sharded = [p for p in backend.scorer.parameters() if isinstance(p, DTensor)]
        parts = {storage._cdata for storage in storages([p.grad for p in sharded])}
        others = [ref.cdata for key, ref in self.storages.items() if key not in parts]
        held = [torch.UntypedStorage._new_with_weak_ptr(cdata) for cdata in others]
        return sum(storage.nbytes() for storage in held if storage is not None)


def storages(tree) -> list[torch.UntypedStorage]:
    return [local(leaf).untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


PLACES = (("forward", 5, ""), ("backward", 2, ""), ("backward", 2, ", old torch"))


def lets_go(rank: int, size: int) -> dict:
    """What a rank holds of a micro-batch that does not fit, and of those in whose place it works on padding."""
    found = {}
    for case, (where, layer, version) in product(("grouped", "grouped by step"), PLACES):
        backend, batches, made = ready(case, (), rank, size)[0], make_batches(rank), Made()
        ranks, facts = backend.ranks, {"left": [], "whole": 0}
        fits, take_part = ranks._fits, ranks.collectives.take_part

        def watched(act, made=made, facts=facts, fits=fits, backend=backend):
            facts["left"] += [made.left(backend)] if made.took else []
            facts["whole"] = 0
            with made:
                return fits(act)

        def counting(*args, facts=facts, take_part=take_part, units=ranks.units):
            facts["whole"] = max(facts["whole"], sum(unit.gathered for unit in units))
            return take_part(*args)

        backend.zero_grad()
        ranks._fits, ranks.collectives.take_part = watched, counting
        with (
            older_torch() if version else nullcontext(),
            failing(backend, *((where, layer, 1) if rank == 1 else NOWHERE)) as its_loss,
            suppress(OutOfMemoryOnRank),
        ):
            backend.forward_backward(batches, its_loss)
        del ranks._fits, ranks.collectives.take_part
        facts["left"].append(made.left(backend))
        found[f"{case}, {where}{version}"] = {**facts, "took": made.took}
    return found


def worker(rank: int, size: int) -> dict:
    """A train worker's step, in which memory runs out on rank 1: one micro-batch of one sample, one of two."""
    found, losses, batches = {}, {}, make_batches(rank)
    for name, place in (("calm", NOWHERE), ("hit", ("backward", 1, 2) if rank == 1 else NOWHERE)):
        one = TrainWorker.__new__(TrainWorker)
        one.rank, one.size, one.wants = rank, size, {"actor": frozenset({"log_probs"})}
        one.compares_logits, one.setup = False, SimpleNamespace(config=Config(), device="cpu")
        one.models = {"actor": make_backend("dense", rank, size, dtype="fp64")}
        one.losses = {"actor": Weighted()}
        one.retries = Counter()
        with failing(one.models["actor"], *place):
            outcome = one.train_step("actor", [table(batch) for batch in batches], 1.0)
        found[name] = outcome.out_of_memory
        losses[name] = outcome.sums["loss"]
        found[f"{name} seen"] = one.losses["actor"].seen[-4:]
        found[f"{name} weights"] = {k: w.double().flatten().tolist() for k, w in weights(one.models["actor"]).items()}
    with failing(one.models["actor"], *(("forward", 0, 1) if rank == 0 else NOWHERE)):
        answers = one.forward("actor", [table(batch) for batch in batches], ("log_probs",))
    found["forward"] = [[len(row) for row in answer["log_probs"]] for answer in answers]
    return found | {"losses": losses}


class Weighted:
    """As `loss`; remembers how many samples the micro-batches had."""

    tokens, losses = 0.0, ()

    def __init__(self):
        self.seen = []

    def __call__(self, batch, outputs):
        self.seen.append(len(batch))
        result = loss(batch, outputs)
        return LossResult(result.loss, {"loss": result.loss.detach()})


def table(batch) -> Table:
    bounds = list(pairwise(batch.bounds))
    count = len(batch)
    return Table(
        tokens=[batch.tokens_T[a:b].numpy() for a, b in bounds],
        columns={"weights": [batch.columns["weights"][a:b].numpy() for a, b in bounds]},
        rewards_N=torch.zeros(count),
        group_N=torch.arange(count),
        rollout_N=torch.arange(count),
        multimodal=[{}] * count,
    )


FOUR = ("both, forward and forward", "the last rank", "step: backward, second micro-batch")
"""Scenarios that are played with four ranks, too."""


def run(rank: int, size: int, folder: Path) -> dict:
    """In a process group of that size."""
    facts = {name: play(name, rank, size) for name in (SCENARIOS if size == 2 else FOUR)}
    others = (log_probs, first_of_all, counted, adapts, lets_go, worker) if size == 2 else ()
    return {"scenarios": facts} | {one.__name__: one(rank, size) for one in others}
