"""The contract of environments."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from miles.diagnosis.playing import MALFORMED, its_own, play, wrong_messages
from miles.environments import EnvironmentLimits, Environments
from miles.targets import described
from miles.testing.contract import ComponentContract, standard_tests
from miles.types import Action, Observation, Prompt, StepResult, ToolCall

LEFT_OUT = "left out"


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
    blocks: ClassVar[float] = 0.5
    """Seconds; no call may keep the event loop to itself for longer."""
    rewards: ClassVar[Sequence[float | None] | None] = None
    """What the steps of the scripted episode must pay."""

    def make_prompt(self) -> Prompt:
        return Prompt(**{"id": "contract:0", "task_set": "contract", "tokens": [1, 2], **self.prompt})

    def environments(self, **limits: int) -> Environments:
        """As a task set has them."""
        return Environments(self.build, EnvironmentLimits(**limits))

    def offers(self, method: str) -> bool:
        """Whether the environment has a method that may be left out."""
        environment = self.build()
        asyncio.run(environment.close())
        return hasattr(environment, method)

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
            assert isinstance(tool["function"]["name"], str), f"a tool has no name: {tool}"
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
            assert isinstance(step.done, bool), f"done={step.done!r} is no bool"
            assert step.reward is None or isinstance(step.reward, int | float), f"reward={step.reward!r} is no number"
            assert step.reward is None or abs(step.reward) < float("inf"), "a reward is not finite"
        assert steps[-1].done or not self.ends, "the scripted episode did not end"
        if self.rewards is not None:
            assert [step.reward for step in steps] == list(self.rewards), "it pays something else than `rewards`"

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
        assert ids in ([], [call.id for call in calls[: len(results)]]), f"results come in the order {ids}"

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
        assert first == alone == third, "the same actions had other answers, beside others that did other things"

    def test_the_same_actions_lead_to_the_same_end(self) -> None:
        """Samples of a group must face one task, and a run be repeatable: draw what is random from the prompt."""
        assert self.play(self.actions) == self.play(self.actions), "the same actions had other answers"

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
        if not self.offers("state_dict"):
            pytest.skip("offers no state_dict: half-finished trajectories begin again")

        async def main() -> list[StepResult]:
            first, second = self.build(), self.build()
            await first.reset(self.make_prompt())
            before = await first.step(self.actions[0])
            state = json.loads(json.dumps(_now(first.state_dict())))
            await first.close()
            second.load_state_dict(state)
            after = [] if before.done else [await second.step(self.actions[1])]
            await second.close()
            return [before, *after]

        if len(self.actions) < 2:
            pytest.skip("the script has one action: nothing is ever half finished")
        halves, whole = asyncio.run(main()), self.play(self.actions)[1][:2]
        assert halves == whole, "it goes on otherwise than it would have without the interruption"

    def test_it_keeps_to_limits(self) -> None:
        """A run plays all environments of a task set under one set of limits, the environment's `limits` among them."""
        made = self.environments(calls=1, episodes=2)

        async def one() -> tuple[Observation, list[StepResult]]:
            environment = made()
            try:
                return await self.episode(environment, self.actions)
            finally:
                await environment.close()

        async def main() -> list[Any]:
            return await asyncio.gather(*(one() for _ in range(4)))

        alone = self.play(self.actions)
        assert asyncio.run(main()) == [alone] * 4, "the same actions had other answers under limits"
        load = made.metrics()
        assert (load["calls_max"], load["episodes_max"]) == (1, 2)

    def test_no_call_blocks_the_event_loop(self) -> None:
        """A call that blocks, in a client that is not asynchronous or in a long computation, stops every other
        trajectory and the engine's requests. `miles.api.in_thread` takes what blocks."""
        self.play(self.actions)  # what is imported at first is imported once
        longest = self.blocks
        for _ in range(3):  # a machine may stand still, too; it does not do so each time
            longest = min(longest, self._longest_block())
        assert longest < self.blocks, f"a call kept the event loop to itself for more than {longest:g} seconds"

    def _longest_block(self) -> float:
        made = self.environments()

        async def main() -> None:
            environment = made()
            try:
                await self.episode(environment, self.actions)
            finally:
                await environment.close()

        asyncio.run(main())
        return made.metrics()["blocked_max"]

    def test_its_script_leads_to_the_end(self) -> None:
        """`script` is what somebody does who knows how: `miles env check` shows it to people."""
        if not self.offers("script"):
            pytest.skip("offers no script")
        episode = asyncio.run(play(self.environments(), self.make_prompt(), its_own, 1000, lambda *_: None))
        assert episode.fault is None, str(episode.fault)
        assert episode.end == "done", f"it ends with: {episode.end}"


def broken_promises(
    build: Callable[[], Any], limits: EnvironmentLimits, prompt: Prompt, actions: Sequence[Action]
) -> dict[str, str]:
    """The standard tests of environments on one that no package need register: name -> what is wrong, empty where
    nothing is; or `left out: ` and why. For `miles env check`."""
    made: list[Environments] = []

    def environments(self: Any, **tighter: int) -> Environments:
        made.append(Environments(build, EnvironmentLimits(**tighter).over(limits)))
        return made[-1]

    def guarded_build(self: Any, **options: Any) -> Any:
        return environments(self)()

    members: dict[str, Any] = {"build": guarded_build, "environments": environments, "make_prompt": lambda self: prompt}
    contract: Any = type("TestIt", (EnvironmentContract,), members | ({"actions": actions} if actions else {}))()
    common = standard_tests(ComponentContract)
    return {
        name: _outcome(getattr(contract, name), made)
        for name, test in standard_tests(EnvironmentContract).items()
        if test is not common.get(name)
    }


def _outcome(test: Callable[[], None], made: list[Environments]) -> str:
    made.clear()
    try:
        test()
    except pytest.skip.Exception as reason:
        return f"{LEFT_OUT}: {reason}"
    except AssertionError as error:
        return str(error) or "it does not hold"
    except Exception as error:
        return described(error)
    failed = sum(environments.metrics().get("close_errors", 0) for environments in made)
    return "closing raised, or took too long" if failed else ""


def _now(state: Any) -> Any:
    assert not inspect.isawaitable(state), "state_dict must not be async"
    return state


def check_messages(messages: Sequence[Any]) -> None:
    """Messages of a conversation, as chat templates take them."""
    assert not wrong_messages(messages), wrong_messages(messages)
