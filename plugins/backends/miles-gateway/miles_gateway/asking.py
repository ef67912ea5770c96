"""What a request may ask for, and how the model's turn is drawn.

Training reckons with one distribution, the task set's. So the task set says how tokens are drawn, and a request only
where an answer ends: its longest length, and more strings and tokens to stop at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miles_serve.errors import RequestError
from miles_serve.openai_types import ChatBody

from miles.api import SamplingParams

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "a session goes on from one answer; send the request again for another one"),
    "ignore_eos": ((False,), "the task set says at which tokens an answer ends"),
    "input_ids": ((), "a session keeps the tokens by itself; send messages"),
    "chat_template_kwargs": (
        ({},),
        "all turns are rendered in one way: set data.chat_template_kwargs in the run's config",
    ),
}
"""Field: values that ask for nothing (besides null), and why others are refused."""


def check(body: ChatBody) -> None:
    """Raises RequestError for what would make a turn that cannot be trained."""
    for name, (harmless, reason) in REFUSED.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise RequestError(f"{name}: not in a session: {reason}.", param=name, code="unsupported_value")


def differing(body: ChatBody, task: SamplingParams) -> list[str]:
    """What of a request asks for another distribution, or for other draws, than the task set's."""
    asked = {name: getattr(body, name) for name in SAMPLING}
    other = [name for name, value in asked.items() if value is not None and value != getattr(task, name)]
    if body.min_tokens:
        other.append("min_tokens")
    return other if body.seed is None else [*other, "seed"]


def sampling(body: ChatBody, task: SamplingParams, ends: tuple[str, ...] = ()) -> SamplingParams:
    """The task set's, ending where the request wants it to.

    Args:
        ends: strings at which an answer ends besides.
    """
    most = task.max_new_tokens if body.most_tokens is None else min(body.most_tokens, task.max_new_tokens)
    return replace(
        task,
        max_new_tokens=most,
        min_new_tokens=min(task.min_new_tokens, most),
        stop=tuple(dict.fromkeys((*task.stop, *body.stops, *ends))),
        stop_token_ids=tuple(dict.fromkeys((*task.stop_token_ids, *(body.stop_token_ids or ())))),
    )
