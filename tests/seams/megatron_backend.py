"""A spike: Megatron-Core behind the train-backend protocol, on the CPU. It proves the seam; it is not a backend to use.

What it leaves out: pipeline stages (the bridge's parts for them are tested without Megatron), packing (Megatron derives
rotary positions from where a token lies, so packed samples need Transformer Engine's attention; here each sample is a
row of a padded batch), Megatron's own optimizer and gradient buckets, which want CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from miles.api import BackendContext, ConfigError, LossFunction, MicroBatch, Outputs, Part, Share, StepReport
from miles.checkpoint_io import read_weights
from miles.toolkit import join_shards

WORLD = "megatron"


def run_on_cpu() -> None:
    """What keeps Megatron-Core 0.16 from running without CUDA. Changes this process for good."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()
    moe_utils.te_general_gemm = None  # without Transformer Engine the router looks for a name that is not there


def parallel(tensor_size: int = 1, expert_size: int = 1) -> None:
    """Megatron's process groups, over a default group that exists already."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size,
        expert_model_parallel_size=expert_size,
        create_gloo_process_groups=False,
    )


class MegatronBackend:
    """`miles.protocols.TrainBackend` over a `GPTModel` of the local layer spec."""

    sums_gradients = True

    def __init__(self, *, context: BackendContext, vocab_multiple: int = 16):
        self.context = context
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.expert_group = parallel_state.get_expert_model_parallel_group()
        dimensions = context.bridge.config_for(WORLD, context.hf_config)
        self.vocab_size = dimensions["model"]["vocab_size"]
        vocab_rows = -(-self.vocab_size // vocab_multiple) * vocab_multiple
        self.part = self._part(dimensions["transformer"].get("num_moe_experts") or 0, vocab_rows)
        self.model = self._build(dimensions, vocab_rows)
        self.take_weights(read_weights(self.context.checkpoint))
        section = context.config.optimizer
        betas = (section.beta1, section.beta2)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), section.lr, betas, weight_decay=section.weight_decay
        )

    def _part(self, experts: int, vocab_rows: int) -> Part:
        share = Share(dist.get_rank(self.tensor_group), self.tensor_group.size())
        expert_share = parallel_state.get_expert_tensor_parallel_group()
        held = experts // self.expert_group.size()
        first = dist.get_rank(self.expert_group) * held
        return Part(
            experts=range(first, first + held),
            tensor=share,
            expert_tensor=Share(dist.get_rank(expert_share), expert_share.size()),
            vocab_rows=vocab_rows,
        )

    def _build(self, dimensions, vocab_rows: int) -> nn.Module:
        config = TransformerConfig(
            **dimensions["transformer"],
            use_cpu_initialization=True,
            tensor_model_parallel_size=self.part.tensor.size,
            expert_model_parallel_size=self.expert_group.size(),
            moe_token_dispatcher_type="allgather",
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
        )
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        return GPTModel(config, spec, **(dimensions["model"] | {"vocab_size": vocab_rows}))

    # ----------------------------------------------------------------------------------------------------- weights

    def take_weights(self, weights: Iterable[dict[str, Tensor]]) -> None:
        missing = dict(self.model.named_parameters())
        with torch.no_grad():
            for group in self.context.bridge.to_world(WORLD, self.context.hf_config, weights, self.part):
                for name, tensor in group.items():
                    parameter = missing.pop(name)
                    if parameter.shape != tensor.shape:
                        raise ConfigError(f"{name} is {list(parameter.shape)} in Megatron, {list(tensor.shape)} here")
                    parameter.copy_(tensor)
        if missing:
            raise ConfigError(f"the bridge gave nothing for {sorted(missing)}")

    def named_weights(self) -> Iterator[dict[str, Tensor]]:
        """Shards of a tensor meet along the dimension the bridge names; each rank brings its own experts."""
        bridge, hf_config = self.context.bridge, self.context.hf_config
        mine = ({name: parameter.detach()} for name, parameter in self.model.named_parameters())
        for group in bridge.from_world(WORLD, hf_config, mine, self.part):
            shardings = {name: bridge.sharding(hf_config, name) for name in group}
            whole = {
                name: join_shards(self._gather(tensor, self._shard_group(shardings[name])), shardings[name])
                for name, tensor in group.items()
            }
            if not any(sharding.expert for sharding in shardings.values()):
                yield whole
                continue
            everyone: list[dict[str, Tensor]] = [{} for _ in range(self.expert_group.size())]
            dist.all_gather_object(everyone, whole, self.expert_group)
            yield from everyone

    def _shard_group(self, sharding) -> dist.ProcessGroup:
        return parallel_state.get_expert_tensor_parallel_group() if sharding.expert else self.tensor_group

    def _gather(self, tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(shards, tensor.contiguous(), group)
        return shards

    # ----------------------------------------------------------------------------------------------------- numbers

    def forward(self, batches: Sequence[MicroBatch], want: frozenset[str]) -> list[Outputs]:
        self.model.eval()
        with torch.no_grad():
            return [self._score(batch, want) for batch in batches]

    def forward_backward(
        self, batches: Sequence[MicroBatch], loss: LossFunction, want: frozenset[str] = frozenset({"log_probs"})
    ) -> dict[str, Tensor]:
        self.model.train()
        sums: dict[str, Tensor] = {}
        for batch in batches:
            result = loss(batch, self._score(batch, want))
            result.loss.backward()
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0) + value
        return sums

    def _score(self, batch: MicroBatch, want: frozenset[str]) -> Outputs:
        """Rows `[N, S]` in, one number a token out. Ranks of a tensor group all compute the same."""
        if "values" in want:
            raise ConfigError("the Megatron spike has no value head")
        lengths = [end - start for start, end in zip(batch.bounds, batch.bounds[1:], strict=False)]
        tokens_NS = self._rows(batch, lengths)
        positions_NS = torch.arange(tokens_NS.shape[1]).expand_as(tokens_NS)
        hidden_SS = torch.ones(2 * tokens_NS.shape[1:], dtype=torch.bool).triu(1)  # what each position must not see
        logits_NSV = self.model(tokens_NS, positions_NS, hidden_SS[None, None]) / self.context.temperature
        logits_NSV = self._without_padding(logits_NSV)
        ends_N = torch.tensor(lengths + [0] * (len(tokens_NS) - len(lengths)))
        predicts_NS = torch.arange(tokens_NS.shape[1]) < ends_N[:, None] - 1
        outputs = Outputs()
        if "log_probs" in want:
            targets_NS = tokens_NS.roll(-1, dims=1)
            scores_NS = -tensor_parallel.vocab_parallel_cross_entropy(logits_NSV.clone(), targets_NS)
            outputs.log_probs_T = self._per_token(scores_NS, predicts_NS, lengths)
        if "entropy" in want:
            log_p_NSV = self._all_columns(logits_NSV).log_softmax(-1)
            outputs.entropy_T = self._per_token(-(log_p_NSV.exp() * log_p_NSV).sum(-1), predicts_NS, lengths)
        if "logits" in want:
            firsts = [torch.zeros(1, self.vocab_size)] * len(lengths)
            columns = [rows[: n - 1] for rows, n in zip(self._all_columns(logits_NSV), lengths, strict=False)]
            logits_TV = torch.cat([row for pair in zip(firsts, columns, strict=True) for row in pair])
            outputs.logits = lambda start, end: logits_TV[start:end]
        return outputs

    def _rows(self, batch: MicroBatch, lengths: list[int]) -> Tensor:
        """One sample a row. Ranks that exchange tokens with each other's experts bring equal shapes."""
        tokens_NS = pad_sequence(list(batch.tokens_T.split(lengths)), batch_first=True)
        shape = torch.tensor(tokens_NS.shape)
        dist.all_reduce(shape, dist.ReduceOp.MAX, self.expert_group)
        more = [int(wanted) - there for wanted, there in zip(shape, tokens_NS.shape, strict=True)]
        return pad(tokens_NS, (0, more[1], 0, more[0]))

    def _per_token(self, values_NS: Tensor, predicts_NS: Tensor, lengths: list[int]) -> Tensor:
        """From rows of predictions to one entry a token, 0 where nothing predicts it."""
        values = values_NS[predicts_NS].split([n - 1 for n in lengths])
        zero = values_NS.new_zeros(1)
        return torch.cat([piece for value in values for piece in (zero, value)])

    def _without_padding(self, logits_NSV: Tensor) -> Tensor:
        """Rows that pad the vocabulary would have logit 0 and a share of the probability."""
        width = logits_NSV.shape[-1]
        columns = torch.arange(width) + self.part.tensor.rank * width
        return logits_NSV.masked_fill(columns >= self.vocab_size, -torch.inf)

    def _all_columns(self, logits_NSV: Tensor) -> Tensor:
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits_NSV)
        return whole[..., : self.vocab_size]

    # --------------------------------------------------------------------------------------------------- optimizer

    def optim_step(self) -> StepReport:
        section = self.context.config.optimizer
        norm = self._sum_gradients()
        skipped = not torch.isfinite(norm).item()
        if not skipped:
            if section.clip_grad and norm > section.clip_grad:
                torch._foreach_mul_([p.grad for p in self.model.parameters()], float(section.clip_grad / norm))
            self.optimizer.step()
        return StepReport(float(norm), skipped, section.lr)

    def _sum_gradients(self) -> Tensor:
        """Add what each rank saw, and return the norm over all parameters of the model, each counted once."""
        squares = torch.zeros(3, dtype=torch.float64)  # replicated, tensor-parallel, expert
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            expert = not getattr(parameter, "allreduce", True)
            if expert:
                dist.all_reduce(parameter.grad, group=parallel_state.get_expert_data_parallel_group())
            else:
                dist.all_reduce(parameter.grad, group=parallel_state.get_data_parallel_group())
            if "q_layernorm" in name or "k_layernorm" in name:  # each rank normalised its own heads
                dist.all_reduce(parameter.grad, group=self.tensor_group)
            kind = 2 if expert else int(getattr(parameter, "tensor_model_parallel", False))
            squares[kind] += parameter.grad.double().square().sum()
        dist.all_reduce(squares[1:2], group=self.tensor_group)
        dist.all_reduce(squares[2:3], group=parallel_state.get_expert_tensor_and_model_parallel_group())
        return squares.sum().sqrt().float()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    # ------------------------------------------------------------------------------------------------------- state

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        state = {"model": dict(self.model.named_parameters()), "optimizer": self.optimizer.state_dict()}
        torch.save(state, directory / f"rank-{dist.get_rank()}.pt")

    def load(self, directory: Path, weights_only: bool = False) -> None:
        state = torch.load(directory / f"rank-{dist.get_rank()}.pt", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state["model"][name])
        if not weights_only:
            self.optimizer.load_state_dict(state["optimizer"])

    def offload(self, parts: frozenset[str]) -> None:
        self._move(parts, torch.device("cpu"))

    def onload(self, parts: frozenset[str]) -> None:
        self._move(parts, torch.device(self.context.device))

    def _move(self, parts: frozenset[str], device: torch.device) -> None:
        if "parameters" in parts:
            self.model.to(device)
        if "gradients" in parts:
            self.zero_grad()
        if "optimizer" in parts:
            for state in self.optimizer.state.values():
                state.update({name: value.to(device) for name, value in state.items()})
