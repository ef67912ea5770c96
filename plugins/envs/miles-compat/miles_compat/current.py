"""The run that functions of upstream are called in. They know one run in a process, as upstream does. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from miles.api import ConfigError


@dataclass
class Current:
    """What plugin hooks were told last."""

    config: Any = None
    """A `miles.config.Config`; None before a run was configured."""
    run: Any = None
    """A `miles.run.Run` while it trains; evaluation alone has none."""
    at_end: list[Callable[[], Any]] = field(default_factory=list)
    """What has to be ended with the run."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was found out of the configuration, by name; forgotten with it."""

    def begin(self, config: Any) -> None:
        self.end()
        self.config = config

    def end(self) -> None:
        """The configuration stays: components of an evaluation may outlive the run."""
        self.run = None
        self.facts.clear()
        while self.at_end:
            self.at_end.pop()()

    def configured(self) -> Any:
        """Raises ConfigError where no run was configured in this process."""
        if self.config is None:
            raise ConfigError("slime_function works in a run: nothing called the hook miles_configure in this process")
        return self.config

    @property
    def step(self) -> int | None:
        """Completed steps, which is the index of the one that goes on; None where nothing trains."""
        return None if self.run is None else int(self.run.step)


current = Current()
