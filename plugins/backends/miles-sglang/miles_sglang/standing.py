"""Whether an engine can serve, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass

from miles.api import EngineError, EngineLostError, EnginePart


@dataclass
class Standing:
    ended: str = "was not started"
    """Why nothing can be asked of it; empty while it runs."""
    lost: str = ""
    """What happened to a server, since when the engine waits to be started again."""
    unusable: str = ""
    """What is wrong with its weights."""
    asleep: frozenset[EnginePart] = frozenset()
    version: int = 0
    """Of the weights that it serves."""
    coming: int | None = None
    """Of those that it is being given, once servers may say so."""

    @property
    def gone(self) -> bool:
        """Nothing can be asked of it."""
        return bool(self.ended or self.lost)

    def check_there(self) -> None:
        """Raises:
        EngineLostError: a server is gone.
        EngineError: it was not started, or was closed.
        """
        if self.ended:
            raise EngineError(f"the SGLang engine {self.ended}")
        if self.lost:
            raise EngineLostError(f"the SGLang engine is lost: {self.lost}")

    def check_serves(self) -> None:
        """Raises:
        EngineError: see `check_there`; or it holds no weights that could be served.
        """
        self.check_there()
        if self.asleep:
            raise EngineError(f"the SGLang engine is asleep: {', '.join(sorted(self.asleep))}")
        if self.unusable:
            raise EngineError(f"the SGLang engine cannot serve requests: {self.unusable}")
