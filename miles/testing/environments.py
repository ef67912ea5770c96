"""The contract of environments."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from miles.testing.contract import ComponentContract
from miles.types import Action, Observation, Prompt, StepResult, ToolCall

MALFORMED = (
    Action(""),
    Action("cut off in the mid", finish_reason="length"),
    Action("答え\ud800\x00"),
    Action("", tool_calls=(ToolCall("no_such_tool", {}),)),
    Action("", tool_calls=(ToolCall("f", {"raw": "{broken"}, error="not JSON"),)),
    Action("", tool_calls=(ToolCall("", {"a": [None, {"b": 1e308}]}), ToolCall("f", {}))),
    Action("wait, " * 2000),
)
"""What models do before they have learnt anything."""


def add(a: float, b: float) -> float:
    """Sum of two numbers: a tool for tests.

    Args:
        a: A number.
        b: Another one.
    """
    return a + b


class EnvironmentContract(ComponentContract):
    """`reset`, `step`, `close`; one object per trajectory.

    Example:
        class TestGuess(EnvironmentContract):
            name = "guess"
            prompt = {"text": "a number from 1 to 9", "label": 7}
            actions = [Action("3"), Action("7")]
            ends = True
    """

    kind = "environments"
    prompt: ClassVar[Mapping[str, Any]] = {"text": "?"}
    """Fields of the `Prompt` that the episodes start from."""
    actions: ClassVar[Sequence[Action]] = (Action("hello"), Action("hello again"))
    """A scripted episode; it may go on after its end, which is not looked at."""
    ends: ClassVar[bool] = False
    """The scripted episode must end: with `done`."""
    rewards: ClassVar[Sequence[float | None] | None] = None
    """What the steps of the scripted episode must pay."""

    def make_prompt(self) -> Prompt:
        return Prompt(**{"id": "contract:0", "task_set": "contract", "tokens": [1, 2], **self.prompt})

    async def episode(self, environment: Any, actions: Sequence[Action]) -> tuple[Observation, list[StepResult]]:
        """Reset and step until the script or the episode ends; the environment stays open."""
        observation = await environment.reset(self.make_prompt())
        steps: list[StepResult] = []
        for action in actions:
            await asyncio.sleep(0)  # others have their turn
            steps.append(await environment.step(action))
            if steps[-1].done:
                break
        return observation, steps

    def play(self, actions: Sequence[Action]) -> tuple[Observation, list[StepResult]]:
        async def main() -> tuple[Observation, list[StepResult]]:
            environment = self.build()
            try:
                return await self.episode(environment, actions)
            finally:
                await environment.close()

        return asyncio.run(main())

    def test_the_first_observation_can_be_rendered(self) -> None:
        """Messages with a role and text, tools as JSON schemas: whatever else reaches the chat template breaks there,
        far from the environment."""
        observation, _ = self.play(())
        assert isinstance(observation, Observation), f"reset returned {type(observation).__name__}"
        check_messages(observation.messages)
        for tool in observation.tools:
            assert tool.get("type") == "function", f"a tool is {{'type': 'function', 'function': ...}}, not {tool}"
            assert isinstance(tool["function"]["name"], str)
            json.dumps(tool)
        if not observation.messages:
            assert self.make_prompt().messages or self.make_prompt().text, "neither it nor the prompt asks anything"

    def test_a_scripted_episode(self) -> None:
        """Steps are StepResults whose messages can be rendered; it ends, and pays, as the author says."""
        _, steps = self.play(self.actions)
        assert steps, "no action was given"
        for step in steps:
            assert isinstance(step, StepResult), f"step returned {type(step).__name__}"
            check_messages(step.messages)
            assert isinstance(step.done, bool)
            assert step.reward is None or isinstance(step.reward, int | float)
            assert step.reward is None or abs(step.reward) < float("inf"), "a reward is not finite"
        assert steps[-1].done or not self.ends, "the scripted episode did not end"
        if self.rewards is not None:
            assert [step.reward for step in steps] == list(self.rewards)

    def test_a_step_that_goes_on_says_something(self) -> None:
        """After it the model speaks again: without a message it would answer itself."""
        _, steps = self.play(self.actions)
        silent = [i for i, step in enumerate(steps) if not step.done and not step.messages]
        assert silent == [], "steps without messages that do not end the episode"

    def test_malformed_actions_are_answered(self) -> None:
        """An exception makes the sample FAILED, and its policy learns nothing; an answer (or the end) teaches it."""
        for action in MALFORMED:
            try:
                _, (step,) = self.play([action])
            except Exception as error:
                raise AssertionError(f"{str(action)[:200]}: {type(error).__name__}: {error}") from error
            check_messages(step.messages)

    def test_parallel_calls_are_answered_in_their_order(self) -> None:
        """Each by its id, whatever becomes of it: templates show results one after the other, many without the ids."""
        observation, _ = self.play(())
        if not observation.tools:
            pytest.skip("offers no tools")
        calls = [ToolCall(tool["function"]["name"], {}, f"call_{i}") for i, tool in enumerate(observation.tools * 3)]
        _, (step,) = self.play([Action("", tool_calls=tuple(calls))])
        results = [message for message in step.messages if message.get("role") == "tool"]
        assert step.done or len(results) == len(calls), f"{len(calls)} calls have {len(results)} results"
        ids = [message["tool_call_id"] for message in results if "tool_call_id" in message]
        assert ids in ([], [call.id for call in calls[: len(results)]])

    def test_two_at_once_do_not_meet(self) -> None:
        """Hundreds of trajectories run side by side; what one does must not be seen by another."""

        async def main() -> list[Any]:
            environments = [self.build() for _ in range(4)]
            others = [self.actions, MALFORMED[:1], self.actions, MALFORMED[3:4]]
            played = zip(environments, others, strict=True)
            try:
                return await asyncio.gather(*(self.episode(environment, actions) for environment, actions in played))
            finally:
                for environment in environments:
                    await environment.close()

        alone = self.play(self.actions)
        first, _, third, _ = asyncio.run(main())
        assert first == alone
        assert third == alone

    def test_the_same_actions_lead_to_the_same_end(self) -> None:
        """Samples of a group must face one task, and a run be repeatable: draw what is random from the prompt."""
        assert self.play(self.actions) == self.play(self.actions)

    def test_closing(self) -> None:
        """Before a reset, in the middle, and twice: an abort can come at any time, and each trajectory is closed."""

        async def main() -> None:
            untouched, halfway = self.build(), self.build()
            await untouched.close()
            await self.episode(halfway, self.actions[:1])
            await halfway.close()
            await halfway.close()

        asyncio.run(main())

    def test_a_half_finished_episode_goes_on_elsewhere(self) -> None:
        """With `state_dict` an aborted trajectory is resumed in another object, also after the process has ended: its
        state is plain data. Without one it begins again."""
        if not hasattr(self.build(), "state_dict"):
            pytest.skip("offers no state_dict: half-finished trajectories begin again")

        async def main() -> tuple[list[StepResult], list[StepResult]]:
            first, second = self.build(), self.build()
            await first.reset(self.make_prompt())
            before = await first.step(self.actions[0])
            state = json.loads(json.dumps(_now(first.state_dict())))
            await first.close()
            second.load_state_dict(state)
            after = [] if before.done else [await second.step(self.actions[1])]
            await second.close()
            return (await self.episode(self.build(), self.actions))[1][:2], [before, *after]

        if len(self.actions) < 2:
            pytest.skip("the script has one action: nothing is ever half finished")
        whole, halves = asyncio.run(main())
        assert halves == whole


def _now(state: Any) -> Any:
    assert not inspect.isawaitable(state), "state_dict must not be async"
    return state


def check_messages(messages: Sequence[Any]) -> None:
    """Messages of a conversation, as chat templates take them."""
    for message in messages:
        assert isinstance(message, Mapping), f"a message is a mapping, not {type(message).__name__}"
        assert message.get("role") in ("system", "user", "tool", "assistant"), f"no such role: {message.get('role')!r}"
        assert isinstance(message.get("content", ""), str | list), "content is text (or a list of parts)"
