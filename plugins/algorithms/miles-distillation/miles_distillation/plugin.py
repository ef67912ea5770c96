"""Registers the advantage term `distillation`, the losses `distill_full` and `distill_topk`, and `scoring_server`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1
WITHOUT_REWARDS = "without rewards"
LOSSES = ("distill_full", "distill_topk")
GKD = "arXiv:2306.13649"

Divergence = Literal["reverse", "forward", "jsd"]
Support = Literal["teacher", "student", "union", "intersection", "xor", "only-teacher", "only-student"]


@dataclass(frozen=True)
class DistillationOptions:
    """How much the teacher's opinion of a token counts."""

    coef: float = 1.0
    """Advantage per nat by which the teacher finds the token likelier than the student does."""

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ConfigError(f"distillation: coef={self.coef} must not be negative: that would flee the teacher")


@dataclass(frozen=True)
class DistillFullOptions:
    """Which divergence of student and teacher is the loss of a token."""

    divergence: Divergence = "reverse"
    """`reverse`: KL(student, teacher). `forward`: KL(teacher, student). `jsd`: generalised Jensen-Shannon."""
    beta: float = 0.5
    """Of `jsd`: the teacher's share of the mixture. Near 0 it behaves like `forward`, near 1 like `reverse`."""
    chunk_size: int = 256
    """Rows of logits that are looked at together: the memory of the loss, not its value."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"distillation: beta={self.beta} must be between 0 and 1, both excluded; "
                "at the ends write divergence: forward (0) or reverse (1)"
            )
        if self.chunk_size < 1:
            raise ConfigError(f"distillation: chunk_size={self.chunk_size} must be at least 1")


@dataclass(frozen=True)
class DistillTopkOptions(DistillFullOptions):
    """The same over some tokens of the vocabulary."""

    k: int = 64
    """Likeliest tokens of a model that are looked at."""
    support: Support = "teacher"
    """Whose likeliest tokens: the teacher's, the student's, those of either, of both, or of exactly one."""
    tail: Literal["bucket", "renormalize"] = "bucket"
    """The rest of the vocabulary: one more outcome that holds its probability, or as if it did not exist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"distill_topk: k={self.k} must be at least 1; policy loss distill_full takes them all")


@dataclass(frozen=True)
class ScoringServerOptions:
    """Where the server is, and how patient to be with it."""

    url: str = ""
    """`http://host:port`, or several with commas between them, which share the work. Each of `teacher.urls` is given to
    an engine of its own."""
    concurrency: int = 32
    """Requests under way at once, over all its URLs."""
    timeout: float = 300.0
    """Seconds for one answer."""
    retries: int = 5
    """Further attempts after a broken connection, a timeout, or a server that is busy (429) or failed (5xx)."""
    start_timeout: float = 300.0
    """Seconds in which the server must become ready when the run begins."""
    api_key_variable: str | None = None
    """Environment variable that holds the server's API key, where it asks for one."""
    check_tokenizer: bool = True
    """Compare the server's tokenizer with the student's when the run begins, where the server offers it."""

    def __post_init__(self) -> None:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"scoring_server: url={self.url!r}: {url!r} must begin with http:// or https://")
        if self.concurrency < 1:
            raise ConfigError(f"scoring_server: concurrency={self.concurrency} must be at least 1")
        if self.retries < 0:
            raise ConfigError(f"scoring_server: retries={self.retries} must not be negative")
        for name in ("timeout", "start_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"scoring_server: {name}={getattr(self, name)} must be above 0 seconds")

    @property
    def urls(self) -> list[str]:
        return [url.strip().rstrip("/") for url in self.url.split(",") if self.url]


@hookimpl
def miles_configure(config: Any) -> None:
    """Raises ConfigError where a loss of this plugin is asked for what a server does not say."""
    loss = config.algorithm.policy_loss
    support = loss.options.get("support", "teacher").removeprefix("only-")
    if loss.name.rpartition("/")[2] in LOSSES and config.teacher.urls and support != "teacher":
        raise ConfigError(
            f"algorithm.policy_loss: support {support!r} needs the teacher's opinion of tokens that it does not name, "
            "and teacher.urls are servers, which report their own likeliest: support: teacher, or --opd-teacher-load"
        )


@hookimpl
def miles_register_advantage_estimators() -> Mapping[str, Component]:
    return {
        "distillation": Component(
            "miles_distillation.sampled:distillation",
            options=DistillationOptions,
            needs={"teacher"},
            flags={"--use-opd": "", "--opd-kl-coef": "coef"},
            provides=("algorithm.advantage_terms", WITHOUT_REWARDS),
            summary="Log-probability of the sampled token under the teacher minus that under the student",
            paper="arXiv:2306.08543",
        )
    }


@hookimpl
def miles_register_policy_losses() -> Mapping[str, Component]:
    return {
        "distill_full": Component(
            "miles_distillation.full:distill_full",
            options=DistillFullOptions,
            needs={"logits", "teacher_logits"},
            provides=(WITHOUT_REWARDS,),
            summary="Divergence of student and teacher over the whole vocabulary, for each token",
            paper=GKD,
        ),
        "distill_topk": Component(
            "miles_distillation.topk:distill_topk",
            options=DistillTopkOptions,
            needs={"logits", "teacher_top_k"},
            flags={"--opd-log-prob-top-k": "k", "--opd-top-k-strategy": "support"},
            provides=(WITHOUT_REWARDS,),
            summary="Divergence of student and teacher over the likeliest tokens, for each token",
            paper=GKD,
        ),
    }


@hookimpl
def miles_register_rollout_engines() -> Mapping[str, Component]:
    return {
        "scoring_server": Component(
            "miles_distillation.scoring_server:ScoringServer",
            options=ScoringServerOptions,
            provides=("scores",),
            summary="Client of a server that scores tokens over SGLang's HTTP API: a teacher",
        )
    }


@hookimpl
def miles_register_presets() -> Mapping[str, Mapping[str, Any]]:
    return {loss: {"algorithm": {"advantage_estimator": "none", "policy_loss": loss}} for loss in LOSSES}
