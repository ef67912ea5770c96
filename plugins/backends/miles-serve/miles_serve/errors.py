"""What a client hears when its request is not answered."""

from __future__ import annotations


class RequestError(Exception):
    """A request that is refused: a sentence for the client, and the HTTP status it comes with."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status
