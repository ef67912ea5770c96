"""Out of memory in a worker: smaller micro-batches, the same step, counted; one sample too large is an error."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miles.builtins.fsdp.memory import OutOfMemoryOnRank
from miles.config import Config
from miles.errors import OutOfMemoryError
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.training.table import Table
from miles.training.worker import TrainWorker, loss_wants
from miles.types import Outputs, StepReport


class Backend:
    """Runs out of memory on micro-batches of more than `room` tokens, after having accumulated part of the step."""

    def __init__(self, room, fails_in="forward_backward", data_size=1):
        self.room, self.fails_in, self.data_size = room, fails_in, data_size
        self.gradient, self.seen = 0.0, []

    def zero_grad(self):
        self.gradient, self.seen = 0.0, []

    def forward_backward(self, batches, loss, want):
        self.samples = [len(batch) for batch in batches]
        for batch in batches:
            if self.fails_in == "forward_backward" and batch.bounds[-1] > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.gradient += float(batch.columns["weights"].sum())
            self.seen.append(list(batch.tokens_T.unique().tolist()))
        return {"train/loss": torch.tensor(self.gradient)}

    def optim_step(self):
        if self.fails_in == "optim_step":
            self.fails_in = ""
            raise torch.OutOfMemoryError("CUDA out of memory")
        return StepReport(1.0, False, 0.1)

    def forward(self, batches, want):
        if any(batch.bounds[-1] > self.room for batch in batches):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Outputs(log_probs_T=batch.tokens_T.float()) for batch in batches]


def worker(backend, **train):
    one = TrainWorker.__new__(TrainWorker)
    one.rank, one.size, one.wants = 0, 1, {"actor": frozenset({"log_probs"})}
    one.setup = SimpleNamespace(config=Config.model_validate({"train": train}), device="cpu")
    one.models = {"actor": backend}
    one.losses = {"actor": SimpleNamespace(losses=[])}
    one.retries = Counter()
    return one


def table(count=4, length=4):
    return Table(
        tokens=[np.full(length, i) for i in range(count)],
        columns={"weights": [np.full(length, 0.25, np.float32) for _ in range(count)]},
        rewards_N=torch.zeros(count),
        group_N=torch.arange(count),
        rollout_N=torch.arange(count),
        multimodal=[{}] * count,
    )


def test_micro_batches_are_halved_until_they_fit_and_nothing_counts_twice():
    backend = Backend(room=4)
    outcome = worker(backend).train_step("actor", [table()], 16.0)
    assert outcome.out_of_memory == 2  # 16 tokens, then 8, then 4
    assert outcome.sums["train/loss"] == 4.0
    whole = worker(Backend(room=100)).train_step("actor", [table()], 16.0)
    assert (whole.sums, whole.report) == (outcome.sums, outcome.report)


def test_the_optimizer_running_out_of_memory_starts_the_step_again():
    backend = Backend(room=100, fails_in="optim_step")
    outcome = worker(backend).train_step("actor", [table()], 16.0)
    assert (outcome.out_of_memory, outcome.sums["train/loss"]) == (1, 4.0)


def test_a_forward_pass_is_halved_too_and_keeps_its_order():
    (result,) = worker(Backend(room=4)).forward("actor", [table()], ("log_probs",))
    assert [row.tolist() for row in result["log_probs"]] == [[float(i)] * 4 for i in range(4)]


def test_retries_of_forward_passes_are_counted_with_the_next_step():
    one = worker(Backend(room=4))
    one.models["reference"] = Backend(room=8)
    one.forward("actor", [table()], ("log_probs",))  # 16 tokens, then 8, then 4
    one.forward("reference", [table()], ("log_probs",))  # 16, then 8
    one.models["actor"].room = 100
    counted = [one.train_step("actor", [table()], 16.0).out_of_memory for _ in range(2)]
    assert counted == [3, 0]


def test_one_sample_that_does_not_fit_is_an_error_that_names_the_knobs():
    with pytest.raises(OutOfMemoryError, match=r"one sample alone of 4 tokens.*--gradient-checkpointing.*--max-tokens"):
        worker(Backend(room=3)).train_step("actor", [table()], 16.0)


def test_ranks_stay_alike_what_cannot_be_halved_gets_an_empty_half():
    backend = Backend(room=8, data_size=2)
    outcome = worker(backend).train_step("actor", [table(3), table(1), table(0)], 16.0)
    assert outcome.out_of_memory == 1
    assert backend.samples == [1, 2, 1, 0, 0, 0]  # twice three micro-batches


def test_memory_of_one_rank_alone_is_not_retried_behind_the_backs_of_the_others():
    one = worker(Backend(room=4, data_size=2))
    one.size = 2
    with pytest.raises(torch.OutOfMemoryError):
        one.train_step("actor", [table()], 16.0)


def test_another_ranks_failure_is_told_as_its_own():
    class Other(Backend):
        def forward_backward(self, batches, loss, want):
            raise OutOfMemoryOnRank(3, alone=True, tokens=99)

    one = worker(Other(room=100, data_size=4))
    with pytest.raises(OutOfMemoryError, match="on rank 3: one sample alone of 99 tokens"):
        one.train_step("actor", [table()], 16.0)


def test_retries_are_bounded():
    with pytest.raises(OutOfMemoryError, match="after 1 retries"):
        worker(Backend(room=4), max_oom_retries=1).train_step("actor", [table(8)], 32.0)


def test_an_entropy_that_is_paid_for_is_computed_without_advantages_too():
    registry, supervised = Registry(load_plugins()), {"advantage_estimator": "none", "policy_loss": "sft"}
    wants = [
        loss_wants(Config.model_validate({"algorithm": {**supervised, "entropy_coef": coefficient}}), registry)
        for coefficient in (0.0, 0.1)
    ]
    assert wants == [{"log_probs"}, {"log_probs", "entropy"}]
