"""From a sample of miles to one of upstream, and back.

What the engine said is known from the requests themselves (`miles_compat.link`): wherever tokens of the finished
sample are an answer of the engine, at the place where it was asked or after it, the weight versions of these tokens,
the turn and the expert choices are that answer's, whatever the function kept of them. Of other tokens that are
trained on, the version is the oldest that the function names, or that the engine answered with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from miles.api import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    ROUTED_EXPERTS,
    TEACHER_LOG_PROBS,
    WEIGHT_VERSION,
    Prompt,
    RolloutError,
    Sample,
    Status,
    Turn,
    expert_choices,
    experts_column,
)
from miles_compat import upstream
from miles_compat.current import current
from miles_compat.experts import compacted
from miles_compat.link import Link, Said, digested
from miles_compat.model import tokenizer

KEPT = "slime_function"
"""Key of `Sample.metadata`: what a sample of upstream holds and one of ours has no place for."""
STAYS = (
    "train_metadata",
    "session_id",
    "routing_key",
    "non_generation_time",
    "custom_rm_path",
    "generate_function_path",
)
"""Fields that are kept so, where a function has set them."""


def task_set_of(prompt: Prompt) -> Any:
    """The task set that a prompt came from; None where the configuration has none of this name."""
    config = current.configured()
    return next((s for s in (*config.data.sets, *config.eval.sets) if s.name == prompt.task_set), None)


# -------------------------------------------------------------------------------------------------------- to upstream's


def theirs(sample: Sample, fresh: bool = False) -> upstream.Sample:
    """As functions of upstream get it.

    Args:
        fresh: the prompt alone, as if nothing had been generated.
    """
    prompt, kept = sample.prompt, {} if fresh else copy.deepcopy(sample.metadata.get(KEPT, {}))
    metadata = {**({"tools": prompt.tools} if prompt.tools else {}), **prompt.metadata, **sample.metadata}
    metadata.pop(KEPT, None)
    made = upstream.Sample(
        group_index=sample.group_id,
        index=sample.id,
        prompt=kept.get("prompt", _prompt(prompt)),
        label=prompt.label,
        metadata=copy.deepcopy(metadata),
    )
    if not fresh and sample.response_length:
        _fill(made, sample, kept.get("response"))
    for name, value in {**kept.get("fields", {}), **kept.get("further", {})}.items():
        setattr(made, name, value)
    return made


def _fill(made: upstream.Sample, sample: Sample, response: str | None) -> None:
    """What was generated."""
    rows, columns = slice(sample.prompt_length, None), sample.columns
    made.rollout_id = None if sample.rollout_id == sample.id else sample.rollout_id
    made.tokens, made.response_length = list(sample.tokens), sample.response_length
    said = sample.tokens[rows]
    made.response = _response(said, sample.text) if response is None else response
    made.loss_mask = sample.loss_mask[rows].tolist()
    made.status = upstream.Status(sample.status.value)
    for column in (ROLLOUT_LOG_PROBS, TEACHER_LOG_PROBS):
        if column.name in columns:
            setattr(made, column.name, columns[column.name][rows].tolist())
    if WEIGHT_VERSION.name in columns:
        versions = columns[WEIGHT_VERSION.name]
        made.weight_versions = [str(versions[turn.end - 1]) for turn in sample.turns if turn.end > turn.start]
    if ROUTED_EXPERTS in columns:
        made.rollout_routed_experts = expert_choices(columns[ROUTED_EXPERTS])
    made.reward = sample.metadata.get(KEPT, {}).get("reward", sample.reward)


def _response(said: Sequence[int], text: str) -> str:
    """Special tokens included, as SGLang says it; where the text is not that of the tokens, it stays what it is."""
    written = tokenizer().decode(said, skip_special_tokens=True)
    return tokenizer().decode(said) if written == text else text


def _prompt(prompt: Prompt) -> Any:
    """Text as the chat template has made it, with --apply-chat-template; else what stands in the data."""
    task_set = task_set_of(prompt)
    rendered = task_set is None or task_set.apply_chat_template
    if prompt.text is not None and not rendered:
        return prompt.text
    if prompt.messages is not None and not rendered:
        return copy.deepcopy(prompt.messages)
    return tokenizer().decode(prompt.tokens or [])


# ------------------------------------------------------------------------------------------------------ from upstream's


def ours(link: Link, made: upstream.Sample, *, listed: bool) -> Sample:
    """The finished sample of a function.

    Args:
        listed: it is one of a list.

    Raises:
        RolloutError: a column has another length than the response, or holds what it cannot.
    """
    asked = link.sample
    tokens, length = _checked(made)
    prompt_length = len(tokens) - length
    sample = Sample(
        asked.id, asked.group_id, asked.prompt, tokens[:prompt_length], prompt_length,
        rollout_id=asked.rollout_id, seed=asked.seed,
    )  # fmt: skip
    sample.declare(LOSS_MASK)
    mask = np.ones(length, np.int8) if made.loss_mask is None else np.asarray(made.loss_mask, np.int8)
    sample.append(tokens[prompt_length:], {LOSS_MASK: 0 * mask if made.remove_sample else mask})
    _write_answers(sample, made, link.said)
    if made.teacher_log_probs is not None:
        sample.write(TEACHER_LOG_PROBS, prompt_length, made.teacher_log_probs)
    sample.text = link.context.chat.decode(tokens[prompt_length:])
    ended = made.status in (upstream.Status.PENDING, upstream.Status.COMPLETED)
    sample.status = Status.COMPLETED if ended else Status(made.status.value)
    sample.messages = copy.deepcopy(list(asked.prompt.messages or []))
    if sample.messages and sample.status is not Status.ABORTED:
        sample.messages.append({"role": "assistant", "content": sample.text})
    if sample.status is Status.FAILED:
        sample.error = f"the function says that it failed: {made.metadata.get('error', 'no `error` in its metadata')}"
    _cut(sample, link.context.max_context_tokens)
    sample.metadata = {**made.metadata, KEPT: _kept(link, made, listed)}
    return sample


def _checked(made: upstream.Sample) -> tuple[list[int], int]:
    """Its tokens, and how many of them are the response.

    Raises:
        RolloutError: the fields do not go together.
    """
    tokens, length = [int(token) for token in made.tokens], made.response_length
    if not isinstance(length, int) or not 0 <= length <= len(tokens):
        raise RolloutError(f"response_length is {length!r}, and there are {len(tokens)} tokens, prompt included")
    for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
        column = getattr(made, name)
        if column is not None and len(column) != length:
            raise RolloutError(
                f"{name} has {len(column)} entries, and response_length is {length}: one entry is expected for each "
                "token of the response, those of tools included, none for the prompt"
            )
        if column is not None and not np.isfinite(np.asarray(column, float)).all():
            raise RolloutError(f"{name} holds what is no finite number: 0 stands for what the model did not draw")
    if made.loss_mask is not None and not {int(each) for each in made.loss_mask} <= {0, 1}:
        raise RolloutError(f"loss_mask holds {sorted(set(made.loss_mask))[:5]}: 1 is trained on, 0 is not")
    return tokens, length


def _write_answers(sample: Sample, made: upstream.Sample, said: Sequence[Said]) -> None:
    """Log-probs, versions, turns and expert choices."""
    start, total = sample.prompt_length, len(sample.tokens)
    log_probs, versions = np.zeros(total, np.float32), np.full(total, WEIGHT_VERSION.fill, np.int32)
    told = 0
    for place, one in _places(sample, said):
        end = place + len(one.tokens)
        log_probs[place:end], versions[place:end] = one.log_probs, one.versions
        sample.turns.append(Turn(place, end, one.finish_reason, one.seconds))
        if one.experts is not None and digested(sample.tokens[: one.start]) == one.prompt and place == one.start:
            first = end - 1 - len(one.experts)
            sample.write(experts_column(one.experts), max(first, told), one.experts[max(told - first, 0) :])
            told = end - 1
    unknown = (sample.loss_mask > 0) & (versions == WEIGHT_VERSION.fill)
    versions[unknown] = _oldest(made, said)
    if made.rollout_log_probs is not None:
        log_probs = np.concatenate([np.zeros(start, np.float32), np.asarray(made.rollout_log_probs, np.float32)])
    if made.rollout_log_probs is not None or not unknown.any():
        sample.write(ROLLOUT_LOG_PROBS, 0, log_probs)
    sample.write(WEIGHT_VERSION, 0, versions)
    if not sample.turns:
        sample.turns = [Turn(a, b, "stop") for a, b in _stretches(sample.loss_mask)]
    if made.rollout_routed_experts is not None and not told:
        rows = compacted(made.rollout_routed_experts)
        if len(rows) != max(total - 1, 0):
            raise RolloutError(f"rollout_routed_experts has {len(rows)} rows for {total} tokens; one fewer is expected")
        sample.write(experts_column(rows), 0, rows)


def _places(sample: Sample, said: Sequence[Said]) -> Iterator[tuple[int, Said]]:
    """Where in the sample's response each answer stands that is found there, in order. A function that kept the
    beginning of an answer alone has that."""
    tokens = np.asarray(sample.tokens, np.int64)
    free = sample.prompt_length
    for one in said:
        place = one.start if one.start >= free and _agree(tokens, one) else _found(tokens, one.tokens, free)
        if place is None or not len(one.tokens):
            continue
        kept = int(min(len(one.tokens), len(tokens) - place))
        if kept < len(one.tokens):
            one = _beginning(one, kept)
        yield place, one
        free = place + kept


def _agree(tokens: np.ndarray, one: Said) -> bool:
    """Whether an answer, or what there is room for of it, stands where it was asked for."""
    there = tokens[one.start : one.start + len(one.tokens)]
    return bool(len(there)) and bool((there == one.tokens[: len(there)]).all())


def _found(tokens: np.ndarray, answer: np.ndarray, start: int) -> int | None:
    """Where a whole answer stands at or after `start`."""
    whole, wanted = tokens.tobytes(), answer.tobytes()
    at = whole.find(wanted, start * tokens.itemsize)
    while at != -1 and at % tokens.itemsize:
        at = whole.find(wanted, at + 1)
    return None if at == -1 else at // tokens.itemsize


def _beginning(one: Said, kept: int) -> Said:
    lost = len(one.tokens) - kept
    experts = None if one.experts is None else one.experts[: len(one.experts) - lost]
    return Said(
        one.start, one.prompt, one.tokens[:kept], one.log_probs[:kept], one.versions[:kept], one.finish_reason,
        one.seconds, experts,
    )  # fmt: skip


def _oldest(made: upstream.Sample, said: Sequence[Said]) -> int:
    answered = [int(one.versions.min()) for one in said if len(one.versions)]
    named = made.oldest_weight_version
    return min([*answered, *(() if named is None else (named,))], default=int(WEIGHT_VERSION.fill))


def _stretches(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each run of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _cut(sample: Sample, limit: int | None) -> None:
    """What no model and no trainer of this run has room for is cut off."""
    if limit is None or len(sample.tokens) <= limit:
        return
    sample.tokens = sample.tokens[:limit]
    sample.prompt_length = min(sample.prompt_length, limit)
    sample.columns = {name: rows[: sample.specs[name].rows(limit)] for name, rows in sample.columns.items()}
    sample.turns = [Turn(t.start, min(t.end, limit), "length", t.seconds) for t in sample.turns if t.start < limit]
    if sample.status is Status.COMPLETED:
        sample.status = Status.TRUNCATED


def _kept(link: Link, made: upstream.Sample, listed: bool) -> dict[str, Any]:
    """What is to be there again when the sample goes back to upstream's functions."""
    default = upstream.Sample()
    said = made.tokens[len(made.tokens) - made.response_length :]
    kept = {
        "prompt": made.prompt if made.prompt != link.prompt else None,
        "response": made.response if made.response != tokenizer().decode(said) else None,
        "fields": {name: getattr(made, name) for name in STAYS if getattr(made, name) != getattr(default, name)}
        or None,
        "further": made.further or None,
        "reward": made.reward,
        "listed": listed or None,
    }
    return {name: value for name, value in kept.items() if value is not None}
