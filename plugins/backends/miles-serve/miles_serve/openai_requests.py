"""What the engine is asked on behalf of an OpenAI client."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from miles.api import GenerateRequest
from miles_serve.openai_types import Body
from miles_serve.service import Service


def asked(
    service: Service,
    body: Body,
    tokens: Sequence[int],
    id: str,
    stops: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> list[GenerateRequest]:
    """What the engine is asked for one prompt: once for every choice, each with a seed of its own. An answer gets as
    much room as the context has, where the client wants more.

    Args:
        id: of the first; the others add their number.
        stops, ends: strings and tokens at which an answer ends, besides those that the client names.

    Raises:
        RequestError: the engine could not serve it.
    """
    room = max(service.context_length - len(tokens), 0)
    most = room if body.most_tokens is None else min(body.most_tokens, room)
    sampling = body.sampling(most, stops, ends)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    return [
        service.request(
            tokens, sampling, id=f"{id}-{i}" if i else id, seed=(seed + i) % 2**63, priority=body.priority or 0
        )
        for i in range(body.n or 1)
    ]
