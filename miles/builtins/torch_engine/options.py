"""Options of the built-in engine. Importing them imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from miles.api import ConfigError


@dataclass(frozen=True)
class TorchEngineOptions:
    """How much runs at once, and in how much memory."""

    max_running: int = 512
    """Requests decoded together; more wait."""
    max_len: int | None = None
    """Longest sequence in tokens, prompt included; the model's `max_position_embeddings` when not given."""
    max_prefill_tokens: int = 8192
    """Prompt tokens in one forward pass; a longer prompt is prefilled in chunks."""
    memory_fraction: float = 0.4
    """Share of the device's memory (of the machine's, on a CPU) that keys and values may take when the two below are
    not given."""
    kv_cache_tokens: int | None = None
    """Tokens of running requests whose keys and values fit."""
    prefix_cache_tokens: int | None = None
    """Tokens of finished prefixes that are kept for requests that extend them; 0 turns the prefix cache off."""
    cuda_graphs: bool = True
    """Decode through CUDA graphs; ignored on a CPU."""
    deterministic: bool = True
    """Let requests join, and results leave, at fixed steps of the engine rather than when the clock happens to say."""
    handover_steps: int = 4
    """Engine steps between two hand-overs of results and requests, while requests are running."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_prefill_tokens", "handover_steps"):
            self._at_least(name, 1)
        for name in ("max_len", "kv_cache_tokens"):
            if getattr(self, name) is not None:
                self._at_least(name, 2)
        if self.prefix_cache_tokens is not None:
            self._at_least("prefix_cache_tokens", 0)
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"torch engine: memory_fraction={self.memory_fraction} must be in (0, 1]")

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ConfigError(f"torch engine: {name}={getattr(self, name)} must be at least {least}")
