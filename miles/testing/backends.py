"""The contract of train backends, on one rank and a model of a few thousand parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from miles.contexts import BackendContext
from miles.protocols import TrainBackend, TrainPart, Want
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.training.packing import build_micro_batch, split_by_sample, split_micro_batch
from miles.types import LossResult, MicroBatch, Outputs, StepReport

LOG_PROBS: frozenset[Want] = frozenset({"log_probs"})
EVERYTHING: frozenset[TrainPart] = frozenset({"parameters", "gradients", "optimizer"})
LENGTHS = (9, 4, 12, 1, 7)


def samples() -> list[np.ndarray]:
    """Samples of unequal length; one has a single token."""
    generator = np.random.default_rng(5)
    return [generator.integers(0, tiny.DIMENSIONS["vocab_size"], length) for length in LENGTHS]


def pack(rows: Sequence[int] = tuple(range(len(LENGTHS)))) -> MicroBatch:
    """A micro-batch of these samples, with a weight for each token."""
    weights = [np.linspace(0.5, 1.5, length, dtype=np.float32) / (i + 1) for i, length in enumerate(LENGTHS)]
    return build_micro_batch(list(rows), samples(), {"weights": weights})


def weighted(batch: MicroBatch, outputs: Outputs) -> LossResult:
    """A weighted sum over tokens, so that it does not matter how they are batched."""
    assert outputs.log_probs_T is not None
    loss = -(outputs.log_probs_T * batch.columns["weights"]).sum()
    return LossResult(loss, {"loss": loss.detach()})


class TrainBackendContract(ComponentContract):
    """One model on one rank: log-probabilities, gradients, steps, state.

    Example:
        class TestFsdp(TrainBackendContract):
            name = "fsdp"

    Needs the bridge of `model_type`: `pip install miles-llama`.
    """

    kind = "train_backends"
    model_type: ClassVar[str] = "llama"
    settings: ClassVar[Mapping[str, Any]] = {}
    """Fields of `BackendContext` that must be others than those of `tiny.backend_context`."""

    def context(self) -> BackendContext:
        folder = tiny.saved(self.model_type)
        return tiny.backend_context(installed(), tiny.hf_config(self.model_type), folder, **self.settings)

    def backend(self) -> TrainBackend:
        return self.build()

    def step(self, backend: TrainBackend, batches: Sequence[MicroBatch] | None = None) -> StepReport:
        backend.zero_grad()
        backend.forward_backward([pack()] if batches is None else batches, weighted)
        return backend.optim_step()

    def weights(self, backend: TrainBackend) -> dict[str, Tensor]:
        return tiny.merged(backend.named_weights())

    def moved(self, change: Callable[[TrainBackend], None]) -> dict[str, Tensor]:
        """The weights of a fresh backend after a change and a step."""
        backend = self.backend()
        change(backend)
        backend.optim_step()
        return self.weights(backend)

    def test_it_takes_the_weights_of_another(self) -> None:
        """A critic starts from the policy's weights, as they are in training and not in a checkpoint."""
        first, second = self.backend(), self.backend()
        self.step(first)
        changed, before = self.weights(first), self.weights(second)
        assert any(not torch.equal(changed[name], before[name]) for name in changed)
        second.take_weights(first.named_weights())
        taken = self.weights(second)
        assert all(torch.equal(changed[name], taken[name]) for name in changed)

    def test_log_probs_are_the_models(self) -> None:
        """Packed or alone, they are what transformers says of each sample: samples do not see each other, and the
        first token of each has 0."""
        lm = tiny.model(tiny.hf_config(self.model_type))
        (outputs,) = self.backend().forward([pack()], LOG_PROBS)
        assert outputs.log_probs_T is not None
        assert outputs.log_probs_T.dtype == torch.float32
        assert not outputs.log_probs_T.requires_grad, "forward is without gradient"
        for found_T, tokens in zip(split_by_sample(outputs.log_probs_T, pack().bounds), samples(), strict=True):
            torch.testing.assert_close(found_T, tiny.log_probs_of(lm, tokens.tolist()), atol=1e-4, rtol=1e-4)

    def test_the_temperature_divides_the_logits(self) -> None:
        """Log-probs of a rollout at another temperature are those of another policy."""
        lm = tiny.model(tiny.hf_config(self.model_type))
        folder, config = tiny.saved(self.model_type), tiny.hf_config(self.model_type)
        context = tiny.backend_context(installed(), config, folder, **{**self.settings, "temperature": 0.6})
        (outputs,) = self._built_with(context).forward([pack([2])], LOG_PROBS)
        expected_T = tiny.log_probs_of(lm, samples()[2].tolist(), 0.6)
        torch.testing.assert_close(outputs.log_probs_T, expected_T, atol=1e-4, rtol=1e-4)

    def _built_with(self, context: BackendContext) -> TrainBackend:
        own = copy.copy(self)
        own.context = lambda: context  # type: ignore[method-assign]
        return own.build()

    def test_entropy_is_of_the_whole_distribution(self) -> None:
        """Over the full vocabulary, of the distribution that predicts the token; 0 where a sample starts."""
        (outputs,) = self.backend().forward([pack([2])], frozenset({"log_probs", "entropy"}))
        assert outputs.entropy_T is not None
        assert outputs.entropy_T[0] == 0
        with torch.no_grad():
            lm = tiny.model(tiny.hf_config(self.model_type))
            logits_TV = lm(torch.tensor(samples()[2])[None], use_cache=False).logits[0, :-1].double()
        log_p_TV = logits_TV.log_softmax(-1)
        expected_T = -(log_p_TV.exp() * log_p_TV).sum(-1).float()
        torch.testing.assert_close(outputs.entropy_T[1:], expected_T, atol=1e-4, rtol=1e-4)

    def test_training_sees_the_log_probs_of_forward(self) -> None:
        """`old_logprobs: recompute` compares the two: they must differ by the update alone. They carry a gradient."""
        backend, seen = self.backend(), []

        def listening(batch: MicroBatch, outputs: Outputs) -> LossResult:
            assert outputs.log_probs_T is not None
            assert outputs.log_probs_T.requires_grad, "the loss gets log-probs without a gradient"
            seen.append(outputs.log_probs_T.detach().cpu())
            return weighted(batch, outputs)

        (outputs,) = backend.forward([pack()], LOG_PROBS)
        backend.zero_grad()
        backend.forward_backward([pack()], listening)
        torch.testing.assert_close(seen[0], outputs.log_probs_T, atol=1e-5, rtol=1e-5)

    def test_gradients_do_not_depend_on_micro_batches(self) -> None:
        """One batch, halves, or each sample alone: the same step. Memory decides how it is cut, and may not decide
        what is learnt."""
        plans: list[list[MicroBatch]] = [
            [pack()],
            list(split_micro_batch(pack())),
            [pack([row]) for row in range(len(LENGTHS))],
        ]
        norms = [self.step(self.backend(), batches).grad_norm for batches in plans]
        assert max(norms) - min(norms) < 1e-4 * norms[0], f"gradient norms: {norms}"

    def test_sums_are_summed_over_micro_batches(self) -> None:
        """Denominators are global: a mean over micro-batches would depend on their number."""
        backend = self.backend()
        backend.zero_grad()
        whole = float(backend.forward_backward([pack()], weighted)["loss"])
        halves = float(backend.forward_backward(list(split_micro_batch(pack())), weighted)["loss"])
        assert math.isclose(whole, halves, rel_tol=1e-5)

    def test_gradients_accumulate_until_they_are_zeroed(self) -> None:
        """The same batch twice is twice its gradient; after `zero_grad` nothing is left."""
        backend = self.backend()
        once = self.step(backend).grad_norm
        fresh = self.backend()
        fresh.zero_grad()
        for _ in range(2):
            fresh.forward_backward([pack()], weighted)
        assert math.isclose(fresh.optim_step().grad_norm, 2 * once, rel_tol=1e-4)
        fresh.zero_grad()
        fresh.forward_backward([pack([])], weighted)
        assert fresh.optim_step().grad_norm == 0

    def test_a_step_learns(self) -> None:
        """The loss goes down, the weights move, and the report says what was done."""
        backend = self.backend()
        before = self.weights(backend)
        losses = []
        for _ in range(5):
            backend.zero_grad()
            losses.append(float(backend.forward_backward([pack()], weighted)["loss"]))
            report = backend.optim_step()
            assert isinstance(report, StepReport)
            assert report.grad_norm > 0
            assert report.learning_rate > 0
            assert not report.skipped
        assert losses[-1] < losses[0]
        after = self.weights(backend)
        assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("proj.weight"))

    def test_a_gradient_that_is_not_finite_skips_the_step(self) -> None:
        """One bad batch must not end a run of days: nothing moves, the report says so, the next step is normal."""
        backend = self.backend()
        before = self.weights(backend)

        def poisoned(batch: MicroBatch, outputs: Outputs) -> LossResult:
            result = weighted(batch, outputs)
            return LossResult(result.loss * math.nan, result.sums)

        backend.zero_grad()
        backend.forward_backward([pack()], poisoned)
        assert backend.optim_step().skipped
        _same(self.weights(backend), before)
        assert not self.step(backend).skipped
        _same(self.weights(backend), self.moved(lambda fresh: _accumulate(fresh)))

    def test_an_empty_micro_batch_takes_part(self) -> None:
        """A rank whose share is smaller gets one, and must walk along with the others."""
        backend = self.backend()
        backend.zero_grad()
        sums = backend.forward_backward([pack([])], weighted)
        assert float(sums["loss"]) == 0
        (outputs,) = backend.forward([pack([])], LOG_PROBS)
        assert outputs.log_probs_T is not None
        assert outputs.log_probs_T.shape == (0,)

    def test_its_weights_have_the_checkpoints_names(self) -> None:
        """What it sends and exports is the checkpoint it was built from, bit for bit before the first step."""
        from safetensors.torch import load_file

        checkpoint = load_file(tiny.saved(self.model_type) / "model.safetensors")
        _same(self.weights(self.backend()), checkpoint)

    def test_a_saved_state_goes_on_bit_for_bit(self, tmp_path: Path) -> None:
        """Weights, optimizer and schedule: a run that was interrupted ends where it would have."""
        first, second = self.backend(), self.backend()
        self.step(first)
        first.save(tmp_path)
        report = self.step(first)
        second.load(tmp_path)
        assert self.step(second) == report
        _same(self.weights(second), self.weights(first))

    def test_weights_alone_can_be_loaded(self, tmp_path: Path) -> None:
        """Another run's start: its weights, and an optimizer that has seen nothing."""
        first, second = self.backend(), self.backend()
        for _ in range(3):
            self.step(first)
        first.save(tmp_path)
        second.load(tmp_path, weights_only=True)
        _same(self.weights(second), self.weights(first))
        assert not _equal(_stepped(self, first), _stepped(self, second)), "the optimizer's state was loaded too"

    def test_a_state_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        """And not a run that starts anew in silence."""
        with pytest.raises(Exception, match=r"."):
            self.backend().load(tmp_path / "nothing")

    def test_offloading_leaves_no_trace(self) -> None:
        """Trainer and engine share a GPU by turns: parts go and come back, in any order, also twice."""
        still, moved = self.backend(), self.backend()
        for backend in (still, moved):
            self.step(backend)
            _accumulate(backend)
        moved.offload(frozenset({"optimizer", "gradients"}))
        moved.offload(EVERYTHING)
        moved.onload(frozenset({"parameters"}))
        (outputs,) = moved.forward([pack()], LOG_PROBS)
        torch.testing.assert_close(outputs.log_probs_T, still.forward([pack()], LOG_PROBS)[0].log_probs_T)
        moved.onload(EVERYTHING)
        assert still.optim_step() == moved.optim_step()
        _same(self.weights(moved), self.weights(still))

    def test_it_says_which_share_it_works_on(self) -> None:
        """On one rank it is the first of one."""
        backend = self.backend()
        assert (backend.data_rank, backend.data_size) == (0, 1)
        assert isinstance(backend.sums_gradients, bool)

    def test_a_reference_only_looks(self) -> None:
        """It has the same log-probs, and no optimizer that costs memory."""
        folder, config = tiny.saved(self.model_type), tiny.hf_config(self.model_type)
        context = tiny.backend_context(installed(), config, folder, **{**self.settings, "role": "reference"})
        (found,) = self._built_with(context).forward([pack()], LOG_PROBS)
        (expected,) = self.backend().forward([pack()], LOG_PROBS)
        torch.testing.assert_close(found.log_probs_T, expected.log_probs_T)


def _accumulate(backend: TrainBackend) -> None:
    backend.zero_grad()
    backend.forward_backward([pack()], weighted)


def _stepped(contract: TrainBackendContract, backend: TrainBackend) -> dict[str, Tensor]:
    contract.step(backend)
    return contract.weights(backend)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"other numbers in {different[:5]}"
