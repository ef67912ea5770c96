"""`train`: the backend, batches and memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.base import ComponentSpec, Flag, Section, Spec


class TrainSection(Section):
    train_backend: Annotated[ComponentSpec, Flag("--train-backend")] = Spec(name="fsdp")
    """Holds the model and its optimizer."""
    global_batch_size: Annotated[int | None, Flag("--global-batch-size"), Field(gt=0)] = None
    """Rollouts in one optimizer step; the whole batch when neither this nor `num_steps_per_rollout` is given."""
    num_steps_per_rollout: Annotated[int | None, Flag("--num-steps-per-rollout"), Field(gt=0)] = None
    """Optimizer steps on each rollout batch, instead of `global_batch_size`."""
    num_epochs_per_rollout: Annotated[int, Flag("--num-epochs-per-rollout"), Field(gt=0)] = 1
    """Passes over each rollout batch."""
    micro_batch_size: Annotated[int, Flag("--micro-batch-size"), Field(gt=0)] = 8
    """Samples in one forward pass, when packing is not dynamic."""
    use_dynamic_batch_size: Annotated[bool, Flag("--use-dynamic-batch-size")] = True
    """Pack samples up to `max_tokens_per_gpu` instead of counting them."""
    max_tokens_per_gpu: Annotated[int, Flag("--max-tokens-per-gpu"), Field(gt=0)] = 8192
    """Tokens in one forward pass of a rank."""
    log_probs_max_tokens_per_gpu: Annotated[int | None, Flag("--log-probs-max-tokens-per-gpu"), Field(gt=0)] = None
    """The same for passes without gradient; `max_tokens_per_gpu` when not given."""
    balance: Annotated[Literal["tokens", "flops", "none"], Flag("--balance")] = "tokens"
    """What data ranks get equally much of: tokens, or FLOPs, since attention costs more in long samples (tokens where
    the model's dimensions are not known)."""
    log_probs_chunk_size: Annotated[int, Flag("--log-probs-chunk-size"), Field(gt=0)] = 1024
    """Tokens whose logits exist at once, in fp32."""
    gradient_checkpointing: Annotated[bool, Flag("--gradient-checkpointing")] = False
    """Recompute activations in the backward pass."""
    dtype: Annotated[Literal["fp64", "fp32", "bf16"], Flag("--train-dtype")] = "fp32"
    """Of forward and backward; with bf16 the optimizer keeps fp32 master weights. fp64 is for comparisons on a CPU."""
    attention: Annotated[Literal["auto", "sdpa", "varlen", "flex", "flash"], Flag("--attention")] = "auto"
    """Attention kernel of the trainer; `auto` is varlen for bf16 on CUDA, else sdpa."""
    compile: Annotated[bool | None, Flag("--compile")] = None
    """Compile the model's layers with torch.compile; when not given, on CUDA unless every bit is to be the same."""
    fsdp_reshard: Annotated[Literal["auto", "layer", "step"], Flag("--fsdp-reshard")] = "auto"
    """When sharded parameters are gathered and gradients reduced: around each layer, or once an optimizer step, which
    takes the memory of the whole model; `auto` where that is at most a quarter of the device's."""
    context_parallel_size: Annotated[int, Flag("--context-parallel-size"), Field(gt=0)] = 1
    """Train ranks that divide the tokens of each sample among them."""
    reproducible_ranks: Annotated[int | None, Flag("--reproducible-ranks"), Field(gt=0)] = None
    """Every step ends at the same bits on 1, 2, 4 ... train ranks that divide this number: micro-batches are planned
    for so many ranks whatever number there is, and their gradients are added in float64."""
    max_nonfinite_steps: Annotated[int, Flag("--max-nonfinite-steps"), Field(ge=0)] = 3
    """Skipped optimizer steps in a row after which the run stops."""
    max_oom_retries: Annotated[int, Flag("--max-oom-retries"), Field(ge=0)] = 4
    """Times a step is retried with micro-batches of half the size after it ran out of memory."""
