"""The term, the losses, the engine and the presets keep the contracts of their kinds."""

import pytest
import torch

from miles.testing import AdvantageEstimatorContract, PolicyLossContract, PresetContract, RolloutEngineContract

TO_THE_LOGITS = "the gradient goes to the logits: test_full and test_topk compare it with the dense one"
PACKING = "the contract gives every selection the logits of the whole batch: test_full and test_topk pack their own"
LOSSES = {"test_the_gradient_reaches_the_log_probs": TO_THE_LOGITS, "test_packing_changes_nothing": PACKING}


class TestDistillation(AdvantageEstimatorContract):
    name = "distillation"
    bad_options = [{"coef": -1.0}]


class OfLogits:
    @pytest.fixture(autouse=True)
    def logits(self, micro_batch, random_logits):
        self.micro_batch, self.random_logits = micro_batch, random_logits

    def inputs(self):
        return self.micro_batch(self.random_logits(0).requires_grad_(), self.random_logits(1), [4, 6, 3])

    def on_policy_gradient(self, inputs):
        return torch.zeros_like(inputs.mask_T)


class TestDistillFull(OfLogits, PolicyLossContract):
    name = "distill_full"
    bad_options = [{"beta": 0.0}, {"chunk_size": 0}]
    skips = LOSSES


class TestDistillTopk(OfLogits, PolicyLossContract):
    name = "distill_topk"
    bad_options = [{"k": 0}, {"beta": 1.0}]
    skips = LOSSES


class TestScoringServer(RolloutEngineContract):
    name = "scoring_server"
    options = {"url": "http://127.0.0.1:9"}
    bad_options = [{"url": "localhost"}, {"concurrency": 0}, {"retries": -1}, {"timeout": -1}]
    skips = {"test_an_engine_that_generates_nothing_says_so": "to score is what it is for; its own tests ask the rest"}

    @pytest.fixture(autouse=True)
    def url(self, server):
        self.options = {"url": server.url}


class TestPresetDistillFull(PresetContract):
    name = "distill_full"


class TestPresetDistillTopk(PresetContract):
    name = "distill_topk"
