"""A model's turns in the token stream of a sample: what every generate function does with what an engine says.

Token in, token out: what the model produced goes into the stream as it is, with loss mask 1, its log-probabilities, the
version of the weights and the experts it went through. A turn that was aborted goes on from the tokens it has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from miles.contexts import GenerateContext
from miles.errors import DataError, EngineError
from miles.experts import experts_column, recorded_experts
from miles.types import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    ROUTED_EXPERTS,
    WEIGHT_VERSION,
    GenerateRequest,
    GenerateResult,
    Sample,
    Turn,
)

RESTARTED = "restarted"
"""Key of `Sample.metadata`: how often a half-finished trajectory had to begin again."""


async def take_turn(context: GenerateContext, sample: Sample) -> str:
    """Let the model speak once, or go on with a turn that was aborted.

    Appends tokens and a `Turn` to the sample.

    Returns:
        The turn's finish reason; `length` when there was no room for a single token.

    Raises:
        DataError: the prompt is empty.
    """
    if not sample.tokens:
        raise DataError(
            f"prompt {sample.prompt.id} has no tokens to continue (its conversation ends with the assistant, or only "
            "its environment says what is asked). Use generate: dataset to train on it, or multi_turn with an "
            "environment"
        )
    turn = sample.turns[-1] if sample.turns else None
    if turn is None or turn.finish_reason != "abort":
        turn = Turn(len(sample.tokens), len(sample.tokens), "abort")  # until the engine says otherwise
        sample.turns.append(turn)
    started, interrupted = time.perf_counter(), True
    while interrupted:
        interrupted = await _speak(context, sample, turn)
    turn.seconds += time.perf_counter() - started
    return turn.finish_reason


async def _speak(context: GenerateContext, sample: Sample, turn: Turn) -> bool:
    """The rest of a turn, or so much of it as comes before new weights do: then True."""
    sampling, said = context.sampling, turn.end - turn.start
    room = sampling.max_new_tokens - said
    if context.max_context_tokens is not None:
        room = min(room, context.max_context_tokens - len(sample.tokens))
    if room <= 0:
        turn.finish_reason = "length"
        return False
    if said or room < sampling.max_new_tokens:
        least = min(max(sampling.min_new_tokens - said, 0), room)
        sampling = replace(sampling, max_new_tokens=room, min_new_tokens=least)
    request = GenerateRequest(
        id=f"{sample.id}.{len(sample.turns)}",
        tokens=list(sample.tokens),
        sampling=sampling,
        seed=sample.seed,
        routed_experts=context.routed_experts,
        routed_experts_from=recorded_rows(sample) if context.routed_experts else 0,
        multimodal=sample.multimodal,
        priority=1 if context.evaluation else -sample.group_id,  # the older first: others wait for the end of it
    )
    result = await context.generate(request)
    if said and sampling.stop:
        result = cut_at_stop(context, sample.tokens[turn.start :], result)
    record(sample, request, result)
    turn.end, turn.finish_reason = len(sample.tokens), result.finish_reason
    return result.interrupted and result.finish_reason == "abort"


def cut_at_stop(context: GenerateContext, said: Sequence[int], result: GenerateResult) -> GenerateResult:
    """What goes on with an aborted turn, up to a stop string that began before the abort.

    An engine looks for stop strings in what it says itself. It does not see one of which the turn has a part already,
    and goes on where the uninterrupted turn had ended.
    """
    chat, params = context.chat, context.sampling
    before = chat.decode(said)
    enough = len(before) + max(map(len, params.stop))  # characters; what begins after the abort the engine has seen
    for count in range(1, len(result.tokens) + 1):
        text = chat.decode([*said, *result.tokens[:count]])
        completed = any(text.count(stop) > before.count(stop) for stop in params.stop)
        if completed and len(said) + count >= params.min_new_tokens:
            rows = result.routed_experts
            left = len(result.tokens) - count
            return replace(
                result,
                tokens=result.tokens[:count],
                log_probs=result.log_probs[:count],
                finish_reason="stop",
                weight_versions=result.weight_versions[:count],
                routed_experts=None if rows is None else rows[: len(rows) - left],
            )
        if len(text) >= enough:
            break
        before = text
    return result


def record(sample: Sample, request: GenerateRequest, result: GenerateResult) -> None:
    """Append what the model produced, with its per-token columns, to the stream that was its request.

    Raises:
        EngineError: expert choices were asked for, and are not there or do not go with the tokens.
    """
    sample.append(
        result.tokens,
        {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: result.log_probs, WEIGHT_VERSION: result.weight_versions},
    )
    if result.routed_experts is not None:
        record_experts(sample, request, result, result.routed_experts)
    elif request.routed_experts and result.finish_reason != "abort":
        raise EngineError(
            f"request {request.id!r} asked for expert choices and was answered without: is the engine's model a "
            "mixture of experts, and does its server return them (SGLang: --enable-return-routed-experts)?"
        )


def recorded_rows(sample: Sample) -> int:
    """How many expert choices a sample has, up to the last one that was recorded."""
    rows = sample.columns.get(ROUTED_EXPERTS)
    looked_at = 256  # it is near the end, mostly: what the environment said since has no choices yet
    while rows is not None and len(rows):
        start = max(len(rows) - looked_at, 0)
        known = np.flatnonzero(recorded_experts(rows[start:]))
        if len(known):
            return start + int(known[-1]) + 1
        rows, looked_at = rows[:start], 4 * looked_at
    return 0


def record_experts(sample: Sample, request: GenerateRequest, result: GenerateResult, rows: np.ndarray) -> None:
    """Write the expert choices that the sample does not have yet. A row stays that of the first pass that told it.

    Rows that an earlier request lost were computed again by this one. They are taken, unless the token that was drawn
    from them is of other weights than these.
    """
    start, first = request.routed_experts_from, len(sample.tokens) - 1 - len(rows)
    if not 0 <= first <= start:
        wanted = len(sample.tokens) - 1 - start
        raise EngineError(f"request {request.id!r} wants {wanted} rows of expert choices and was given {len(rows)}")
    column, rows = experts_column(rows), rows[start - first :]
    drawn_by = sample.columns[WEIGHT_VERSION.name][start + 1 : len(request.tokens)]
    lost = (drawn_by != WEIGHT_VERSION.fill) & (drawn_by != next(iter(result.weight_versions), None))
    if lost.any():
        rows = rows.copy()
        rows[: len(lost)][lost] = column.fill
    sample.write(column, start, rows)


def begin_again(sample: Sample, tokens: Sequence[int]) -> None:
    """Make `tokens` the prompt of a sample that has said nothing worth keeping."""
    sample.tokens, sample.columns, sample.specs, sample.turns = [], {}, {}, []
    sample.prompt_length = len(tokens)
    sample.declare(LOSS_MASK)
    sample.append(tokens)
