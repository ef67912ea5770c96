"""What a client hears when its request is not answered."""

from __future__ import annotations


class RequestError(Exception):
    """A request that is refused: a sentence for the client, and the HTTP status it comes with.

    OpenAI's API also says which parameter was wrong, and a word that programs can compare.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
