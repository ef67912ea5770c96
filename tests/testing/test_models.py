"""Transforms, precision schemes and routing replays: right ones, and ones that are wrong in one way each."""

from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from miles.api import expert_choices
from miles.builtins.plain_precision import PlainPrecision
from miles.testing import ModelTransformContract, PrecisionSchemeContract, RoutingReplayContract


class Freeze:
    """Trains the norms alone."""

    def prepare(self, model, role):
        return model

    def trainable(self, name):
        return "norm" in name

    def synced(self, groups):
        return iter(groups)


class Scaled(nn.Module):
    """A wrapper whose factor starts at 1."""

    def __init__(self, linear):
        super().__init__()
        self.wrapped, self.more = linear, nn.Parameter(linear.weight.new_zeros(linear.out_features))

    def forward(self, x):
        return self.wrapped(x) * (1 + self.more)


class Adapting(Freeze):
    def prepare(self, model, role):
        for layer in model.model.layers:
            layer.self_attn.q_proj = Scaled(layer.self_attn.q_proj)
        return model

    def trainable(self, name):
        return name.endswith(".more")


def but(base, **methods):
    return type("Wrong", (base,), methods)


def test_right_transforms_pass(passes):
    passes(ModelTransformContract, Freeze)
    passes(ModelTransformContract, Adapting)


def test_wrong_transforms_are_caught(catches):
    def actors_only(self, model, role):
        if role == "actor":
            return model
        raise ValueError(role)

    def by_numbers(self, model, role):
        float(model.lm_head.weight.detach().sum())
        return model

    def random_start(self, model, role):
        nn.init.normal_(model.model.norm.weight)
        return model

    def renaming(self, model, role):
        model.model.final = model.model.norm
        del model.model._modules["norm"]
        model.model.__dict__["norm"] = model.model.final
        return model

    def poisoned(self, groups):
        return ({name: tensor * float("nan") for name, tensor in group.items()} for group in groups)

    catches(
        ModelTransformContract,
        {
            "test_it_prepares_a_model_of_every_role": [
                but(Freeze, prepare=actors_only),
                but(Freeze, prepare=lambda self, model, role: None),
            ],
            "test_a_model_without_numbers_can_be_prepared": [but(Freeze, prepare=by_numbers)],
            "test_at_first_nothing_changes": [but(Freeze, prepare=random_start)],
            "test_something_learns": [
                but(Freeze, trainable=lambda self, name: False),
                but(Freeze, trainable=lambda self, name: name if "norm" in name else ""),
            ],
            "test_the_checkpoints_names_stay": [but(Freeze, prepare=renaming)],
            "test_what_is_synced_are_weights": [
                but(Freeze, synced=lambda self, groups: iter(())),
                but(Freeze, synced=poisoned),
                but(Freeze, synced=lambda self, groups: (g for group in groups for g in (group, group))),
            ],
        },
    )


# --------------------------------------------------------------------------------------------------------- precision


def test_the_built_in_scheme_passes(passes):
    passes(PrecisionSchemeContract, PlainPrecision)


def test_wrong_schemes_are_caught(catches):
    def losing(self, groups):
        return (group for group in groups if not any("norm" in name for name in group))

    def at_once(self, groups):
        yield {name: tensor for group in groups for name, tensor in group.items()}

    def unguarded_scale(self, groups):
        for group in groups:
            yield {name: tensor / tensor.abs().max() for name, tensor in group.items()}

    def in_place(self, groups):
        for group in groups:
            yield {name: tensor.mul_(0.5) for name, tensor in group.items()}

    def once(self):
        if hasattr(self, "entered"):
            raise RuntimeError("entered twice")
        self.entered = True
        return nullcontext()

    def by_numbers(self, model):
        float(model.lm_head.weight.detach().sum())
        return model

    def frozen(self, model):
        return model.requires_grad_(False)

    plain = PlainPrecision
    catches(
        PrecisionSchemeContract,
        {
            "test_the_tolerance_is_a_positive_number": [
                but(plain, logprob_tolerance=0.0),
                but(plain, logprob_tolerance=float("inf")),
            ],
            "test_the_model_it_prepared_runs": [
                but(plain, autocast=once),
                but(plain, prepare=frozen),
                but(plain, prepare=lambda self, model: None),
                but(plain, autocast=lambda self: torch.no_grad()),
            ],
            "test_a_model_without_numbers_can_be_prepared": [
                but(plain, prepare=by_numbers),
            ],
            "test_what_is_exported_is_whole": [but(plain, export=losing), but(plain, export=at_once)],
            "test_zeros_and_huge_numbers_are_exported_as_numbers": [
                but(plain, export=unguarded_scale),
                but(plain, export=lambda self, gs: ({n: (t * 1e3).half() for n, t in g.items()} for g in gs)),
            ],
            "test_exporting_leaves_the_weights_alone": [but(plain, export=in_place)],
            "test_the_engines_options_are_data": [
                but(plain, engine_options=lambda self: {"dtype": torch.float32}),
                but(plain, engine_options=lambda self: None),
            ],
        },
    )


# ---------------------------------------------------------------------------------------------------- routing replay


class Replay:
    """Experts by the column of the batch, probabilities by the router (R3)."""

    differentiable = True
    uses_column = True

    def attach(self, model, model_config):
        self.active = None
        gates = [
            (int(n.split(".layers.")[1].split(".")[0]), m) for n, m in model.named_modules() if n.endswith(".gate")
        ]
        for layer, gate in gates:
            gate.forward = self.routed(layer, gate, gate.forward)

    def routed(self, layer, gate, forward):
        def choose(hidden):
            logits, scores, chosen = forward(hidden)
            if self.active is None:
                return logits, scores, chosen
            recorded = self.active[:, layer].long()
            rows = recorded[:, :1] >= 0
            chosen = torch.where(rows, recorded, chosen) if self.uses_column else chosen
            picked = logits.float().softmax(-1).gather(-1, chosen)
            if gate.norm_topk_prob:
                picked = picked / picked.sum(-1, keepdim=True)
            return logits, (picked if self.differentiable else picked.detach()).to(scores.dtype), chosen

        return choose

    def recording(self):
        return nullcontext()

    @contextmanager
    def replaying(self, batch):
        self.active = expert_choices(batch.columns["rollout_routed_experts"])
        yield
        self.active = None


def test_a_right_replay_passes(passes):
    passes(RoutingReplayContract, Replay)


def test_wrong_replays_are_caught(catches):
    class Lasting(Replay):
        @contextmanager
        def replaying(self, batch):
            self.active = expert_choices(batch.columns["rollout_routed_experts"])
            yield

    class Breaking(Replay):
        def attach(self, model, model_config):
            super().attach(model, model_config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".gate.weight" in name:
                        parameter.neg_()

    class Shifted(Replay):
        @contextmanager
        def replaying(self, batch):
            self.active = expert_choices(batch.columns["rollout_routed_experts"]).roll(1, 0)
            yield
            self.active = None

    class Compact(Replay):
        """Takes 255 for an expert."""

        @contextmanager
        def replaying(self, batch):
            self.active = batch.columns["rollout_routed_experts"]
            yield
            self.active = None

    catches(
        RoutingReplayContract,
        {
            "test_attached_it_changes_nothing": [Breaking],
            "test_replaying_its_own_choices_changes_nothing": [Shifted, Compact],
            "test_the_recorded_choices_are_used": [but(Replay, uses_column=False), Lasting],
            "test_routers_go_on_learning": [but(Replay, differentiable=False)],
        },
    )
