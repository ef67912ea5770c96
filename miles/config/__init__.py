"""Typed configuration: one file per section; loading, flags and errors beside them."""

from miles.config.base import NONE, RewardSpec, Spec
from miles.config.data import Keys, Sampling, TaskSet
from miles.config.schema import Config

__all__ = ["NONE", "Config", "Keys", "RewardSpec", "Sampling", "Spec", "TaskSet"]
