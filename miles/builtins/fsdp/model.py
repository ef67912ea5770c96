"""From a transformers config to a module with weights on this rank.

Parameters are first built without storage, so that neither the whole model nor a random draw of it is ever held in
memory: the module is changed (transforms, precision), sharded if there is more than one rank, given storage for this
rank's part alone, and then filled from a stream of tensors, one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM

from miles.api import BackendContext, ConfigError, TrainError, WeightGroup
from miles.builtins.fsdp.attention import choose, register
from miles.builtins.fsdp.compiled import compile_layers, compiles, decoder_layers
from miles.builtins.fsdp.norms import fuse_norms
from miles.builtins.fsdp.scorer import TokenScorer
from miles.builtins.fsdp.ulysses import register as register_slices
from miles.toolkit import read_weights

UNIT = 2**26
"""Parameters that are worth a collective, and a layer's hooks: 128 MiB in bf16."""
LOGIT_RULES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config keys of models that change logits after the head, which the scorer would have to do too."""
SCORE = frozenset({"score.weight"})
"""What transformers calls the head of a sequence classifier, `[1, H]`."""
COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the transformers module lives. Modules keep their identity through adapters and sharding."""

    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.attribute)


@dataclass(frozen=True)
class Built:
    """A module ready for work, and its tensors under the names that transformers gave them."""

    scorer: TokenScorer
    attention: str
    """Its kernel."""
    slots: dict[str, Slot]
    tied: frozenset[str]
    """Second names of tensors in `slots`; a checkpoint may or may not repeat them."""


def build(context: BackendContext, mesh: DeviceMesh | None) -> Built:
    """The module of `context.role`, without values in its weights: see `fill`."""
    train = context.config.train
    compute_dtype = COMPUTE_DTYPES[train.dtype]
    trains = context.role in ("actor", "critic")
    hf_config = quiet_config(context.hf_config)
    if context.precision is not None:
        context.precision.configure(train.train_backend.name, {**hf_config.to_dict(), "dtype": train.dtype})
    attention = choose(train.attention, context.device, compute_dtype, head_size(hf_config))
    with parameters_on_meta():
        lm: Any = AutoModelForCausalLM.from_config(
            hf_config,
            attn_implementation=(register if train.context_parallel_size == 1 else register_slices)(attention),
            dtype=torch.promote_types(compute_dtype, torch.float32) if trains and mesh is not None else compute_dtype,
            trust_remote_code=context.config.model.trust_remote_code,
            **({"experts_implementation": "eager"} if compute_dtype == torch.float64 else {}),  # others know no float64
        )
    fuse_norms(lm)
    slots = find_slots(lm)
    ties = {name: (_slot(lm, name), _slot(lm, source)) for name, source in find_ties(lm).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.config.run.seed)
        for transform in context.transforms:
            lm = transform.prepare(lm, context.role)
        scorer = TokenScorer(
            context.precision.prepare(lm) if context.precision is not None else lm,
            temperature=context.temperature,
            chunk_size=train.log_probs_chunk_size,
            critic=context.role == "critic",
            compiled=compiles(context),
        )
    if scorer.compiled:
        compile_layers(scorer.lm)
    choose_trainable(scorer, context, slots)
    scorer.train(train.gradient_checkpointing)  # nothing else depends on the mode: dropout is off
    if train.gradient_checkpointing:
        scorer.lm.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh is not None:
        shard(scorer, mesh, compute_dtype, reproducible=train.reproducible_ranks is not None)
    scorer._apply(lambda t: torch.empty_like(t, device=context.device) if t.is_meta else t.to(context.device))
    for place, source in ties.values():
        setattr(place.module, place.attribute, source.tensor)
    return Built(scorer, attention, slots, frozenset(ties))


def quiet_config(hf_config: Any) -> Any:
    """A copy with dropout and router noise off: a ratio of two policies means nothing if either is drawn at random.

    Raises:
        ConfigError: the model changes its logits after the head.
    """
    config = copy.deepcopy(hf_config)
    text = config.get_text_config()
    rules = [key for key in LOGIT_RULES if getattr(text, key, None) not in (None, 1, 1.0)]
    if rules:
        raise ConfigError(
            f"model type {text.model_type!r} sets {', '.join(rules)}, which backend `fsdp` does not apply"
        )
    for part in {id(config): config, id(text): text}.values():
        for key, value in part.to_dict().items():
            noise = key.endswith(("dropout", "_pdrop", "dropout_prob", "jitter_noise"))
            if noise and isinstance(value, int | float) and value:
                setattr(part, key, 0.0)
    return config


def head_size(hf_config: Any) -> int:
    text = hf_config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters registered within have shape and dtype but no storage; buffers are computed as usual."""
    plain = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def find_slots(lm: nn.Module) -> dict[str, Slot]:
    """Parameters (tied ones once) and persistent buffers, in the module's order."""
    names = [name for name, _ in lm.named_parameters()]
    saved = lm.state_dict()
    names += [name for name, _ in lm.named_buffers() if name in saved]
    return {name: _slot(lm, name) for name in names}


def find_ties(lm: nn.Module) -> dict[str, str]:
    """Names of parameters that are others' second names, and those others."""
    first: dict[int, str] = {}
    named = lm.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _slot(lm: nn.Module, name: str) -> Slot:
    path, _, attribute = name.rpartition(".")
    return Slot(lm.get_submodule(path), attribute)


def choose_trainable(scorer: TokenScorer, context: BackendContext, slots: dict[str, Slot]) -> None:
    """Frozen: everything of a reference or teacher, what a transform says, and the head of a critic."""
    trains = context.role in ("actor", "critic")
    for name, parameter in scorer.lm.named_parameters():
        allowed = all(transform.trainable(name) for transform in context.transforms)
        parameter.requires_grad_(trains and allowed and parameter.is_floating_point())
    head, embedding = scorer.lm.get_output_embeddings(), scorer.lm.get_input_embeddings()
    if context.role == "critic" and head.weight is not embedding.weight:
        head.requires_grad_(False)


def units(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Layers that are gathered and reduced together, in their order: at most a quarter of the model, so that
    communicating goes on beside computing."""
    if not layers:
        return []
    size = sum(parameter.numel() for parameter in layers[0].parameters())
    together = max(min(-(-UNIT // size), len(layers) // 4), 1)
    return [list(layers[i : i + together]) for i in range(0, len(layers), together)]


def shard(scorer: TokenScorer, mesh: DeviceMesh, compute_dtype: torch.dtype, reproducible: bool) -> None:
    """FSDP2: decoder layers in units of some `UNIT` parameters, the rest in the root, gathered until its backward.

    Gradients are summed over ranks, in float32 or, to be reproducible, float64; a trained model keeps float32
    parameters and gathers them in the compute dtype.
    """
    wide = torch.float64 if reproducible else torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide)
    for unit in units(decoder_layers(scorer.lm)):
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, mp_policy=policy)
    if scorer.value_head is not None:
        fully_shard(scorer.value_head, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=wide))
    fully_shard(scorer, mesh=mesh, mp_policy=policy)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


# ------------------------------------------------------------------------------------------------------------- weights


def initial_weights(context: BackendContext, scorer: TokenScorer | None = None) -> Iterator[WeightGroup]:
    """The checkpoint's tensors under the module's names, or with `model.random_init` a draw from the seed.
    A critic gives its `scorer`, whose value head they may bring."""
    model = context.config.model
    if not model.random_init:
        stream = read_weights(context.checkpoint)
        if scorer is not None and scorer.value_head is not None:
            stream = value_weights(stream, scorer.value_head, scorer.lm)
        return context.bridge.to_world("torch", context.hf_config, stream)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.config.run.seed)
        lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(context.hf_config), dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    return ({name: slot.tensor.detach()} for name, slot in find_slots(lm).items())


@torch.no_grad()
def value_weights(stream: Iterable[WeightGroup], head: nn.Linear, lm: Any) -> Iterator[WeightGroup]:
    """A checkpoint for a critic: the score of a sequence classifier becomes the value head, and the head over the
    vocabulary, which such a checkpoint lacks and a critic does not use, is zero."""
    name, unused = "lm_head.weight", lm.get_output_embeddings().weight
    lacks = unused is not lm.get_input_embeddings().weight
    for group in stream:
        lacks = lacks and name not in group
        for key in SCORE & set(group):
            copy_into(head.weight, group[key])
        yield {key: tensor for key, tensor in group.items() if key not in SCORE}
    if lacks:
        yield {name: torch.zeros(unused.shape)}


@torch.no_grad()
def fill(built: Built, stream: Iterable[WeightGroup], write: Callable[[Tensor, Tensor], None]) -> None:
    """Hand every full tensor of the stream to `write(tensor of the module, full tensor)`.

    Raises:
        TrainError: a tensor is missing, unknown or of another shape.
    """
    missing = dict(built.slots)
    for group in stream:
        for name, full in group.items():
            if name in built.tied:
                continue
            slot = missing.pop(name, None)
            if slot is None:
                raise TrainError(
                    f"the weights bring {name!r} {tuple(full.shape)}, which the model has not (or had already)"
                )
            if full.shape != slot.tensor.shape:
                raise TrainError(
                    f"{name!r} is {tuple(full.shape)} in the weights, {tuple(slot.tensor.shape)} in the model"
                )
            write(slot.tensor, full)
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise TrainError(f"the weights lack {len(missing)} of the model's {len(built.slots)} tensors: {names} ...")


def copy_into(tensor: Tensor, full: Tensor) -> None:
    """Fill a parameter or buffer, sharded or not, from a full tensor; no communication."""
    if isinstance(tensor, DTensor):
        moved = full.to(tensor.device, tensor.dtype)
        full = distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(full)


def one_by_one(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[WeightGroup]:
    """Each of the tensors whole, in a group of its own; all ranks take them together. On a GPU the next one is on
    its way while one is used. Two are held at a time."""
    coming: tuple[str, Tensor] | None = None
    for name, tensor in tensors:
        begun = name, _begin_gathering(tensor)
        if coming is not None:
            yield {coming[0]: _arrived(coming[1])}
        coming = begun
    if coming is not None:
        yield {coming[0]: _arrived(coming[1])}


@torch.no_grad()
def _begin_gathering(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    # Two collectives of gloo under way at once corrupt the heap now and then, in the threads that work on them (torch
    # 2.13). On a CPU there is little to overlap either.
    overlapping = tensor.device.type != "cpu"
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim, async_op=overlapping).to_local()


def _arrived(tensor: Tensor) -> Tensor:
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
