"""The second public module, for components that compute: what backends, bridges and losses share. Needs torch."""

from miles.training.logprobs import align_with_tokens, log_probs_from_logits, next_tokens, selected_log_probs
from miles.training.packing import (
    build_micro_batch,
    chunk_micro_batches,
    gather_rows,
    move_micro_batch,
    plan_micro_batches,
    split_by_sample,
    split_micro_batch,
    take_samples,
)
from miles.weights import COLUMN, ROW, Concat, Form, Inverse, Op, OpBridge, Stack, Weight, cut_shard, join_shards

__all__ = [
    "COLUMN",
    "ROW",
    "Concat",
    "Form",
    "Inverse",
    "Op",
    "OpBridge",
    "Stack",
    "Weight",
    "align_with_tokens",
    "build_micro_batch",
    "chunk_micro_batches",
    "cut_shard",
    "gather_rows",
    "join_shards",
    "log_probs_from_logits",
    "move_micro_batch",
    "next_tokens",
    "plan_micro_batches",
    "selected_log_probs",
    "split_by_sample",
    "split_micro_batch",
    "take_samples",
]
