"""The second public module, for components that compute: what backends, bridges and losses share. Needs torch."""

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
    "cut_shard",
    "join_shards",
]
