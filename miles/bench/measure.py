"""What a benchmark is, and what came of it: the values of its rounds, their median and spread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from miles.bench.workbench import Workbench

Better = Literal["higher", "lower", "neither"]
"""`neither`: told for orientation, such as the speed of something that is not ours."""
OWN = ""
"""Key of the quantity that has the benchmark's own name."""

YARDSTICK = "machine"
"""How fast the machine itself is, by the benchmark of this name: what is compared, is compared with this in view."""

Round = Callable[[], Awaitable[Mapping[str, float]]]
"""Does the work once and returns a value for each quantity of its benchmark."""


@dataclass(frozen=True)
class Quantity:
    """One number that a round gives."""

    unit: str
    better: Better


@dataclass(frozen=True)
class Benchmark:
    """A piece of work that is repeated. Its quantities are called `name` (key `OWN`) and `name/key`."""

    about: str
    quantities: Mapping[str, Quantity]
    prepare: Callable[[Workbench], Awaitable[Round]]
    """Everything that is not measured; returns what is."""
    needs: tuple[str, ...] = ()
    """Distributions without which it is left out."""

    def names(self, name: str) -> dict[str, str]:
        """Key of a quantity -> its full name, when the benchmark is called `name`."""
        return {key: f"{name}/{key}" if key else name for key in self.quantities}


@dataclass
class Measured:
    """One quantity over all rounds."""

    unit: str
    better: Better
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def spread(self) -> float:
        """The interquartile range: half of the rounds lie within it. 0 for a single round."""
        if len(self.rounds) < 2:
            return 0.0
        first, _, third = quantiles(self.rounds, n=4, method="inclusive")
        return third - first


@dataclass
class Circumstances:
    """What a benchmark's rounds saw and took, one entry a round where it can be known."""

    seconds: list[float] = field(default_factory=list)
    """Of the whole round, with what it does around the work that is timed."""
    contention: list[float] = field(default_factory=list)
    """Share of the round during which some thread of the machine waited for a core (Linux pressure stall information).
    Threads of the benchmark that wait for each other's core are among them."""
    peak_mib: list[float] = field(default_factory=list)
    """Most memory that the process (on a GPU: its tensors) held during the round."""
    added_mib: list[float] = field(default_factory=list)
    """That minus what it held when the round began."""
