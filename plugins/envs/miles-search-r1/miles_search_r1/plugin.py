"""Registers the environment and the reward `search_r1`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from miles.api import Component, ConfigError, hookimpl

MILES_API = 1


@dataclass(frozen=True)
class SearchOptions:
    """Who is asked, and what the model is told."""

    backend: Literal["local", "serper"] = "local"
    """A retrieval server (`miles search serve`), or Google by way of serper.dev."""
    url: str | None = None
    """Where it is; `http://127.0.0.1:8000/retrieve` and `https://google.serper.dev/search` if not given."""
    topk: int = 3
    """Passages for a query."""
    concurrency: int = 256
    """Most searches under way at once."""
    timeout: float = 60.0
    """Seconds for one request."""
    retries: int = 2
    """Further attempts after one that broke, was late, or was told to come back later (429, 5xx)."""
    on_failure: Literal["fail", "tell"] = "fail"
    """When a search fails for good: the sample fails, and is tried again from its beginning; or the model is told."""
    max_result_length: int = 4000
    """Characters of what was found; the rest is cut off."""
    api_key_variable: str = "SERPER_API_KEY"
    """Environment variable that holds the key of serper.dev."""
    invalid_action_message: str = (
        "\nThis is neither a search nor an answer. I put a query between <search> and </search>, "
        "and what I finally answer between <answer> and </answer>.\n"
    )
    """What a turn without either is answered with."""

    def __post_init__(self) -> None:
        for name, least in (("topk", 1), ("concurrency", 1), ("retries", 0), ("max_result_length", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"search_r1: {name}={getattr(self, name)} must be at least {least}")
        if self.timeout <= 0:
            raise ConfigError(f"search_r1: timeout={self.timeout} must be positive")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"search_r1: url={self.url!r} must begin with http:// or https://")
        if self.backend == "serper" and not os.environ.get(self.api_key_variable):
            raise ConfigError(
                f"search_r1: the environment variable {self.api_key_variable}, which api_key_variable names, is not "
                "set; it holds the key of serper.dev"
            )


@dataclass(frozen=True)
class RewardOptions:
    """What an answer is worth, by whether it is right and whether the conversation has the form that was asked for."""

    score: float = 1.0
    """A right answer in a valid conversation."""
    structure_format_score: float = 0.2
    """A valid conversation without the right answer. A right answer in an invalid one is worth so much less."""
    final_format_score: float = 0.1
    """Any answer, neither right nor in a valid conversation."""
    retrieval_score: float = 0.1
    """Added to `structure_format_score` where the right answer stood in what was found."""
    prompt_opens_thoughts: bool = False
    """The prompt ends with <think>, so that the first opening tag is not the model's."""

    def __post_init__(self) -> None:
        terms = (self.structure_format_score, self.final_format_score, self.retrieval_score)
        if min(terms) < 0:
            raise ConfigError("search_r1: structure_format_score, final_format_score and retrieval_score are 0 or more")
        wrong = max(self.structure_format_score + self.retrieval_score, self.final_format_score)
        right = self.score - self.structure_format_score
        if wrong > right:
            raise ConfigError(
                f"search_r1: a wrong answer may be worth {wrong:g}, a right one as little as {right:g} (score less "
                "structure_format_score): the policy would learn the form and no more"
            )


@hookimpl
def miles_register_environments() -> Mapping[str, Component]:
    return {
        "search_r1": Component(
            "miles_search_r1.environment:SearchR1",
            options=SearchOptions,
            flags={
                "--search-r1-backend": "backend",
                "--search-r1-url": "url",
                "--search-r1-topk": "topk",
                "--search-r1-concurrency": "concurrency",
            },
            summary="<search> queries are answered with <information>, until there is an <answer>",
            paper="arXiv:2503.09516",
        )
    }


@hookimpl
def miles_register_rewards() -> Mapping[str, Component]:
    return {
        "search_r1": Component(
            "miles_search_r1.reward:SearchR1Reward",
            options=RewardOptions,
            flags={
                "--search-r1-structure-format-score": "structure_format_score",
                "--search-r1-final-format-score": "final_format_score",
                "--search-r1-retrieval-score": "retrieval_score",
            },
            summary="Exact match of the <answer>, with terms for the form and for what was found",
            paper="arXiv:2503.09516, arXiv:2505.15117",
        )
    }
