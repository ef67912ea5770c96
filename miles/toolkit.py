"""The second public module, for components that compute or read: what backends, bridges, losses and data sources share.
Needs torch."""

from miles.buckets import Bucket, pack, places, unpack
from miles.checkpoint_io import read_weights, resolve_checkpoint, write_checkpoint, write_safetensors
from miles.config import Config, Keys, TaskSet
from miles.config.optimizer import OptimizerSection
from miles.data.prompts import read_prompt
from miles.data.readers import open_rows
from miles.data.screening import screen
from miles.durable import put_in_place, sync_tree
from miles.shipment import Shipment, opened, this_process
from miles.training.aggregation import mean_per_sample, sample_index, spread_over_samples, sum_per_sample
from miles.training.checksums import checksums
from miles.training.episodes import Episodes, discounted_sums, kl_cost
from miles.training.logprobs import align_with_tokens, log_probs_from_logits, next_tokens, selected_log_probs
from miles.training.packing import (
    build_micro_batch,
    chunk_micro_batches,
    move_micro_batch,
    plan_micro_batches,
    split_by_sample,
    split_micro_batch,
    take_samples,
)
from miles.training.statistics import GroupStatistics, per_token, whiten
from miles.training.surrogate import LOG_RATIO_BOUND, bounded_log_ratio, clipped_surrogate
from miles.weights import COLUMN, ROW, Concat, Form, Inverse, Op, OpBridge, Stack, Weight, cut_shard, join_shards
from miles.workers.compute import compute_thread
from miles.workers.failure import Failure, WorkerFailure, raised
from miles.workers.group import DirectLink, Link, Workers
from miles.workers.host import WorkerHost, torchrun_environment
from miles.workers.process import ProcessLink
from miles.workers.settling import when_idle, with_driver

__all__ = [
    "COLUMN",
    "LOG_RATIO_BOUND",
    "ROW",
    "Bucket",
    "Concat",
    "Config",
    "DirectLink",
    "Episodes",
    "Failure",
    "Form",
    "GroupStatistics",
    "Inverse",
    "Keys",
    "Link",
    "Op",
    "OpBridge",
    "OptimizerSection",
    "ProcessLink",
    "Shipment",
    "Stack",
    "TaskSet",
    "Weight",
    "WorkerFailure",
    "WorkerHost",
    "Workers",
    "align_with_tokens",
    "bounded_log_ratio",
    "build_micro_batch",
    "checksums",
    "chunk_micro_batches",
    "clipped_surrogate",
    "compute_thread",
    "cut_shard",
    "discounted_sums",
    "join_shards",
    "kl_cost",
    "log_probs_from_logits",
    "mean_per_sample",
    "move_micro_batch",
    "next_tokens",
    "open_rows",
    "opened",
    "pack",
    "per_token",
    "places",
    "plan_micro_batches",
    "put_in_place",
    "raised",
    "read_prompt",
    "read_weights",
    "resolve_checkpoint",
    "sample_index",
    "screen",
    "selected_log_probs",
    "split_by_sample",
    "split_micro_batch",
    "spread_over_samples",
    "sum_per_sample",
    "sync_tree",
    "take_samples",
    "this_process",
    "torchrun_environment",
    "unpack",
    "when_idle",
    "whiten",
    "with_driver",
    "write_checkpoint",
    "write_safetensors",
]
