"""The contracts of what changes a model: transforms, precision schemes, routing replays."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from miles.contexts import Role
from miles.experts import compact_experts, experts_column
from miles.testing import tiny
from miles.testing.contract import ComponentContract
from miles.training.packing import build_micro_batch
from miles.types import ROUTED_EXPERTS

WORDS = [5, 17, 3, 3, 200, 41, 8]


def logits_of(model: nn.Module) -> Tensor:
    """`[T, V]` of a few tokens, with a gradient."""
    return model(torch.tensor([WORDS]), use_cache=False).logits[0].float()


def without_storage(config: Any) -> nn.Module:
    """A model whose parameters have shapes and no numbers yet, as backends build them to save memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class ModelTransformContract(ComponentContract):
    """`prepare(model, role)`, `trainable(name)`, `synced(groups)`.

    Example:
        class TestFreeze(ModelTransformContract):
            name = "freeze"
            options = {"pattern": "embed"}
    """

    kind = "model_transforms"
    model_type: ClassVar[str] = "llama"
    preserves: ClassVar[bool] = True
    """A model that was just prepared computes what it did before: an adapter starts at zero."""

    def model(self) -> nn.Module:
        return tiny.model(tiny.hf_config(self.model_type))

    def test_it_prepares_a_model_of_every_role(self) -> None:
        """Reference and critic are built by the same code: a transform that does not concern them leaves them be."""
        for role in get_args(Role):
            prepared = self.build().prepare(self.model(), role)
            assert isinstance(prepared, nn.Module), f"{role}: prepare returned {type(prepared).__name__}"
            assert logits_of(prepared).isfinite().all()

    def test_a_model_without_numbers_can_be_prepared(self) -> None:
        """Backends prepare before weights are loaded; what is computed from the numbers then is computed from none."""
        prepared = self.build().prepare(without_storage(tiny.hf_config(self.model_type)), "actor")
        assert any(True for _ in prepared.parameters())

    def test_at_first_nothing_changes(self) -> None:
        """Training starts from the policy that was given; else its first log-probs belong to nobody."""
        if self.preserves:
            expected = logits_of(self.model())
            found = logits_of(self.build().prepare(self.model(), "actor"))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

    def test_something_learns(self) -> None:
        """`trainable` answers for every parameter; an actor without any would train nothing, and look healthy."""
        transform = self.build()
        prepared = transform.prepare(self.model(), "actor")
        answers = {name: transform.trainable(name) for name, _ in prepared.named_parameters()}
        assert {type(answer) for answer in answers.values()} == {bool}, "trainable answers True or False"
        assert any(answers.values()), "no parameter is trained"

    def test_the_checkpoints_names_stay(self) -> None:
        """The bridge knows the family's names: a transform adds parameters, it renames none."""
        before = {name for name, _ in self.model().named_parameters()}
        prepared = self.build().prepare(self.model(), "actor")
        after = {name for name, _ in prepared.named_parameters()}
        kept = {name for name in before if name in after or any(_wraps(other, name) for other in after)}
        assert kept == before, f"lost: {sorted(before - kept)[:5]}"

    def test_what_is_synced_are_weights(self) -> None:
        """Everything, or an adapter alone: a stream of names and tensors, each once, with finite numbers."""
        transform = self.build()
        transform.prepare(self.model(), "actor")
        sent = tiny.merged(transform.synced(tiny.groups_of(dict(self.model().named_parameters()))))
        assert sent, "nothing is sent to the engines"
        assert all(isinstance(tensor, Tensor) and tensor.isfinite().all() for tensor in sent.values())


def _wraps(name: str, original: str) -> bool:
    """Whether `a.base.weight` is `a.weight` within a wrapper."""
    module, _, attribute = original.rpartition(".")
    return name.startswith(f"{module}.") and name.endswith(f".{attribute}")


class PrecisionSchemeContract(ComponentContract):
    """`configure`, `prepare`, `autocast`, `export`, `engine_options`, `logprob_tolerance`.

    Example:
        class TestPlain(PrecisionSchemeContract):
            name = "plain"
    """

    kind = "precision_schemes"
    model_type: ClassVar[str] = "llama"
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    """Values of `train.dtype` that it goes with."""

    def schemes(self) -> dict[str, Any]:
        found = {}
        for dtype in self.dtypes:
            found[dtype] = self.build()
            found[dtype].configure("fsdp", {"dtype": dtype})
        return found

    def weights(self) -> dict[str, Tensor]:
        """A checkpoint's tensors, with a matrix of zeros and one of huge numbers among them."""
        named = {n: p.detach() for n, p in tiny.model(tiny.hf_config(self.model_type)).named_parameters()}
        matrices = [name for name, tensor in named.items() if tensor.ndim == 2]
        return {
            **named,
            matrices[1]: torch.zeros_like(named[matrices[1]]),
            matrices[2]: named[matrices[2]] * 1e4,
        }

    def test_the_tolerance_is_a_positive_number(self) -> None:
        """The probe after a weight sync compares with it: 0 would stop every run, infinity none."""
        for scheme in self.schemes().values():
            assert 0 < scheme.logprob_tolerance < 10

    def test_the_model_it_prepared_runs(self) -> None:
        """A forward pass within `autocast`, and a gradient through it; twice, since it is entered for every batch."""
        for dtype, scheme in self.schemes().items():
            model = scheme.prepare(tiny.model(tiny.hf_config(self.model_type)))
            assert isinstance(model, nn.Module)
            for _ in range(2):
                with scheme.autocast():
                    logits = logits_of(model)
                assert logits.isfinite().all(), dtype
            logits.square().mean().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert gradients, f"{dtype}: no gradient reaches a parameter"
            assert all(gradient.isfinite().all() for gradient in gradients)

    def test_a_model_without_numbers_can_be_prepared(self) -> None:
        """Backends prepare before weights are loaded."""
        for scheme in self.schemes().values():
            assert isinstance(scheme.prepare(without_storage(tiny.hf_config(self.model_type))), nn.Module)

    def test_what_is_exported_is_whole(self) -> None:
        """Every weight arrives, under its own name (a scale beside it has a name of its own), streamed."""
        weights = self.weights()
        for dtype, scheme in self.schemes().items():
            sent = tiny.merged(scheme.export(tiny.groups_of(weights)))
            assert weights.keys() <= sent.keys(), f"{dtype}: lost {sorted(weights.keys() - sent.keys())[:5]}"
            stream = scheme.export(tiny.groups_of(weights))
            assert len(next(iter(stream))) < len(weights), f"{dtype}: everything comes at once"

    def test_zeros_and_huge_numbers_are_exported_as_numbers(self) -> None:
        """A block of zeros has scale 0: divided by it, the engine's weights are NaN."""
        for dtype, scheme in self.schemes().items():
            for name, tensor in tiny.merged(scheme.export(tiny.groups_of(self.weights()))).items():
                assert tensor.float().isfinite().all(), f"{dtype}: {name}"

    def test_exporting_leaves_the_weights_alone(self) -> None:
        """They are the trainer's, handed over by reference, and go on being trained."""
        weights = self.weights()
        before = copy.deepcopy(weights)
        for scheme in self.schemes().values():
            for _ in scheme.export(tiny.groups_of(weights)):
                continue
        assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())

    def test_the_engines_options_are_data(self) -> None:
        """They cross to an engine, perhaps in another process, and into the run's record."""
        for scheme in self.schemes().values():
            assert isinstance(scheme.engine_options(), Mapping)
            json.dumps(dict(scheme.engine_options()))


class RoutingReplayContract(ComponentContract):
    """`attach(model, config)`, `recording()`, `replaying(batch)`.

    Example:
        class TestR3(RoutingReplayContract):
            name = "r3"
    """

    kind = "routing_replays"
    model_type: ClassVar[str] = "qwen3_moe"

    def model(self) -> nn.Module:
        return tiny.model(tiny.hf_config(self.model_type, output_router_logits=False))

    def batch(self, model: nn.Module) -> Any:
        """One sample with the experts that this model chooses for it, `[T, layers, top_k]`, compact; none for the last
        token. `miles.api.expert_choices` says what they are."""
        with torch.no_grad():
            routing = model(torch.tensor([WORDS]), use_cache=False, output_router_logits=True).router_logits
        top_k = model.config.num_experts_per_tok  # type: ignore[union-attr]
        chosen = torch.stack([layer.view(len(WORDS), -1).topk(top_k).indices for layer in routing], dim=1)
        rows = compact_experts(chosen[:-1].numpy(), int(model.config.num_experts))  # type: ignore[union-attr, arg-type]
        specs = {ROUTED_EXPERTS: experts_column(rows)}
        return build_micro_batch([0], [WORDS], {ROUTED_EXPERTS: [rows]}, specs=specs)

    def attached(self, seed: float = 0.0) -> tuple[Any, nn.Module, Any]:
        """A replay attached to a model and having recorded its choices, and the batch; the routers then move."""
        replay, model = self.build(), self.model()
        batch = self.batch(model)
        replay.attach(model, model.config)
        with replay.recording():
            logits_of(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".gate.weight" in name:
                    parameter.add_(seed * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        return replay, model, batch

    def test_attached_it_changes_nothing(self) -> None:
        """Outside of `recording` and `replaying` the model routes by itself."""
        _, model, _ = self.attached()
        torch.testing.assert_close(logits_of(model), logits_of(self.model()))

    def test_replaying_its_own_choices_changes_nothing(self) -> None:
        """With the weights of the rollout the experts are those it would choose."""
        replay, model, batch = self.attached()
        with replay.replaying(batch):
            found = logits_of(model)
        torch.testing.assert_close(found[:-1], logits_of(self.model())[:-1], atol=1e-5, rtol=1e-4)

    def test_the_recorded_choices_are_used(self) -> None:
        """After an update routers choose others; the trainer must not."""
        replay, model, batch = self.attached(seed=5.0)
        by_itself = logits_of(model)
        with replay.replaying(batch):
            replayed = logits_of(model)
        assert not torch.allclose(by_itself[:-1], replayed[:-1], atol=1e-3), "the model goes on choosing by itself"
        torch.testing.assert_close(logits_of(model), by_itself)

    def test_routers_go_on_learning(self) -> None:
        """Choices are fixed, probabilities are not: their gradient reaches the router."""
        replay, model, batch = self.attached()
        with replay.replaying(batch):
            logits_of(model)[:-1].square().mean().backward()
        routers = [parameter for name, parameter in model.named_parameters() if ".gate.weight" in name]
        assert all(router.grad is not None and router.grad.abs().sum() > 0 for router in routers)
