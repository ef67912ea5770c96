"""Every error that miles raises on purpose.

One tree under `MilesError`. Each leaf is also the stdlib error it specialises, so `except ValueError` works for
somebody who knows nothing of miles. A message says what was wrong, where it came from (config key, file and line,
plugin, distribution, version), what would be accepted, and how to fix it.

`exit_code` is what the command line exits with: 2 when the request was wrong, 1 when the run failed.
"""


class MilesError(Exception):
    """Root of the tree."""

    exit_code = 1


class ConfigError(MilesError, ValueError):
    """A configuration value is unknown, of the wrong type, or contradicts another one."""

    exit_code = 2


class UnknownNameError(ConfigError, LookupError):
    """No component, plugin or preset has this name."""


class PluginError(MilesError, RuntimeError):
    """A plugin is broken: see the subclasses."""

    exit_code = 2


class PluginLoadError(PluginError, ImportError):
    """A plugin, or a component's target, could not be imported."""


class PluginConflictError(PluginError, ValueError):
    """Two plugins claim one name, or a required plugin is missing or has the wrong version."""


class HookError(PluginError, TypeError):
    """A hook is misspelt, has wrong arguments, or returned something of the wrong type."""


class DataError(MilesError, ValueError):
    """A prompt file, a data set or a sample is malformed."""

    exit_code = 2


class EngineError(MilesError, RuntimeError):
    """A rollout engine refused a request or stopped working."""


class EngineLostError(EngineError):
    """The engine itself is gone, with all that it was doing. Another one can serve the request; or it can, once it was
    started again and has its weights."""


class RolloutError(MilesError, RuntimeError):
    """Too few usable samples came out of a rollout."""


class WeightError(MilesError, ValueError):
    """Tensors do not fit the model: one is missing, unknown, given twice, or of the wrong shape."""

    exit_code = 2


class WeightSyncError(MilesError, RuntimeError):
    """After a weight sync an engine does not hold the trainer's weights."""


class TrainError(MilesError, RuntimeError):
    """A training step could not be done."""


class OutOfMemoryError(TrainError, MemoryError):
    """One sample alone does not fit; smaller micro-batches cannot help any more."""


class NonFiniteError(TrainError, ArithmeticError):
    """Too many optimizer steps in a row had a non-finite loss or gradient."""


class CheckpointError(MilesError, OSError):
    """A checkpoint could not be written, or none of those found could be read."""


class WorkerError(MilesError, RuntimeError):
    """A worker process failed; its traceback comes first."""


class RunInterrupted(MilesError, InterruptedError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal
