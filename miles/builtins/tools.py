"""Environment `tools`: functions that the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from miles.api import ToolEnvironment, import_target
from miles.builtins.options import ToolsOptions


class Tools(ToolEnvironment):
    """See `ToolEnvironment`. The rewards of the task set judge the answer."""

    def __init__(self, options: ToolsOptions):
        super().__init__()
        self.timeout, self.max_result_length = options.timeout, options.max_result_length
        self._functions = [import_target(name, "environment tools") for name in options.functions]

    def tools(self) -> Sequence[Callable[..., Any]]:
        return self._functions
