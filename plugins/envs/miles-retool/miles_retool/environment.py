"""Environment `retool`: the model writes programs, and reads what they print.

tools   a call of the function `code_interpreter`; the result is a tool message (Miles' recipe retool_v2)
text    <code>...</code> or a block of ```python in the model's own turn; the result stands behind it, between
        <interpreter> tags, until the model writes `Answer: \\boxed{...}` (slime's recipe retool)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from miles.api import (
    Action,
    EnvironmentLimits,
    Observation,
    Prompt,
    StepResult,
    ToolCall,
    ToolEnvironment,
    WorkerError,
    in_thread,
)
from miles_retool.plugin import RetoolOptions
from miles_retool.sandbox.pool import GRACE_SECONDS, Result, shared_sandbox

INSTRUCTIONS = """\
You solve problems step by step, and may run Python on the way. Write a whole program between <code> and </code>; what \
it prints is shown to you between <interpreter> and </interpreter>, and then you go on. Programs share nothing with \
each other, and see nothing but the standard library. End with a line `Answer: \\boxed{...}` that holds the result."""
NO_ACTION = (
    "\n\nThat was neither a program nor an answer. Write a program between <code> and </code>, or end with "
    "Answer: \\boxed{...}.\n\n"
)
STOPPED = {
    "time": "Error: Code execution timed out after {0.seconds:g} seconds",
    "memory": "Error: More than {0.memory_mb} MiB of memory",
    "output": "Error: More than {0.output_kb} KiB of output",
    "lost": "Error: The sandbox was lost",
}
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
ANSWER = re.compile(r"Answer:\s*\\boxed\s*\{")


class Retool(ToolEnvironment):
    """One trajectory. Programs of all of them run in one sandbox, each in a process of its own."""

    def __init__(self, options: RetoolOptions):
        super().__init__()
        self.options = options
        self.timeout = math.inf  # the sandbox has a clock for each program, which does not count its waiting
        self.max_result_length = options.max_result_length
        self.limits = EnvironmentLimits(
            calls=options.concurrency, step_timeout=options.max_tool_calls * options.seconds + 2 * GRACE_SECONDS
        )
        self.stop = ("</code>", "</tool_call>") if options.protocol == "text" else ()
        self._sandbox = shared_sandbox(options.limits, options.packages, options.concurrency, options.require)
        self._fault: WorkerError | None = None
        self.counts["programs"] = 0  # that were run: calls that cannot be read, or are too many, are not among them

    def tools(self) -> Sequence[Callable[..., Any]]:
        return [self.code_interpreter]

    async def code_interpreter(self, code: str) -> str:
        """A tool for executing Python code in a safe sandbox environment.

        Args:
            code: The Python code to execute in the sandbox environment.
        """
        if not code.strip():
            return "Error: No code provided"
        if self.counts["programs"] >= self.options.max_tool_calls:
            return f"Error: all {self.options.max_tool_calls} calls are used; give your answer"
        self.counts["programs"] += 1
        try:
            result = await self._sandbox.run(code)
        except WorkerError as error:
            self._fault = error  # not for the model to see: nothing that it did
            raise
        self.counts["tool_errors"] += result.failed
        return self._shown(result)

    def _shown(self, result: Result) -> str:
        shown = f"Output:\n{result.stdout}" if result.stdout or not result.failed else ""
        if result.stderr:
            shown += f"\nErrors:\n{result.stderr}"
        if result.stopped:
            shown += "\n" + STOPPED[result.stopped].format(self.options.limits)
        elif result.exit_code and not result.stderr:
            shown += f"\nError: Process exited with code {result.exit_code}"
        return shown.strip("\n")

    async def reset(self, prompt: Prompt) -> Observation:
        """Raises WorkerError when the sandbox cannot start here, or cannot protect what it must."""
        await in_thread(self._sandbox.start)
        if self.options.protocol == "tools":
            return await super().reset(prompt)
        instructions = INSTRUCTIONS if self.options.instructions is None else self.options.instructions
        asked = list(prompt.messages or [{"role": "user", "content": prompt.text or ""}])
        if instructions and asked[0]["role"] != "system":
            asked.insert(0, {"role": "system", "content": instructions})
        return Observation(tuple(asked))

    async def step(self, action: Action) -> StepResult:
        """Raises WorkerError when the sandbox is at fault."""
        result = await (super().step(action) if self.options.protocol == "tools" else self._text_step(action))
        if self._fault is not None:
            raise self._fault
        return result

    async def _text_step(self, action: Action) -> StepResult:
        if action.finish_reason == "length":
            return StepResult(done=True)
        said = action.text if action.text.strip() else action.reasoning  # a stop string may end a turn within thoughts
        code = program_in(said) or called(action)
        if ANSWER.search(said) and code is None:
            return StepResult(done=True)
        if code is None:
            return self._inline(NO_ACTION)
        text, failed = await self._result(ToolCall("code_interpreter", {"code": code}))
        self.counts["tool_calls"] += 1
        self.counts["tool_errors"] += failed
        return self._inline(f"\n\n<interpreter>\n{text}\n</interpreter>\n\n")

    def _inline(self, text: str) -> StepResult:
        return StepResult(({"role": "user", "content": text},), info=dict(self.counts), inline=True)

    def script(self, prompt: Prompt) -> Iterator[Action]:
        """A policy that prints the label, and says it."""
        code = f"print({str(prompt.label)!r})"
        if self.options.protocol == "tools":
            yield Action("", tool_calls=(ToolCall("code_interpreter", {"code": code}, "call_0"),))
        else:
            yield Action(f"<code>\n{code}\n</code>")
        yield Action(f"Answer: \\boxed{{{prompt.label}}}")


def program_in(said: str) -> str | None:
    """The last program of a turn, without the fence that may stand within its tags; None without one.

    A block of ```python counts where no answer follows it: people also show code that they do not want to run.
    """
    before, closed, _ = said.rpartition("</code>")
    _, opened, tagged = before.rpartition("<code>")  # in one pass: a model may repeat a tag for ever
    if opened and closed:
        code = tagged.split("</code>")[0]
        fenced = FENCE.search(code)
        return fenced[1] if fenced else code
    blocks = list(FENCE.finditer(said))
    return blocks[-1][1] if blocks and not ANSWER.search(said, blocks[-1].end()) else None


def called(action: Action) -> str | None:
    """The program of a tool call, which `text` understands as well."""
    for call in action.tool_calls:
        code = call.arguments.get("code")
        if call.name == "code_interpreter" and not call.error:
            return code if isinstance(code, str) else json.dumps(code)
    return None
