"""Environments that are wrong in one way each."""

import random
import time
from dataclasses import replace

from miles.api import Action, Observation, StepResult, ToolEnvironment
from miles.testing import EnvironmentContract
from miles.testing.environments import add

SCRIPT = {
    "prompt": {"text": "a number from 1 to 9", "label": 7},
    "actions": [Action("3"), Action("7")],
    "ends": True,
    "rewards": [0.0, 1.0],
}


class Guess:
    """Guess a number. What is wrong in a mutant is one method of it."""

    def __init__(self):
        self.secret, self.tries = None, 0

    async def reset(self, prompt):
        self.secret = prompt.label
        return Observation(({"role": "user", "content": "Guess."},))

    async def step(self, action):
        self.tries += 1
        right = action.text.strip() == str(self.secret)
        return StepResult(({"role": "user", "content": f"Try {self.tries}."},), float(right), right)

    async def close(self):
        self.secret = None


class Resumable(Guess):
    def state_dict(self):
        return {"secret": self.secret, "tries": self.tries}

    def load_state_dict(self, state):
        self.secret, self.tries = state["secret"], state["tries"]


class Adding(ToolEnvironment):
    def tools(self):
        return [add]


def but(base=Guess, **methods):
    return type("Wrong", (base,), methods)


def test_right_ones_pass(passes):
    passes(EnvironmentContract, Guess, **SCRIPT)
    passes(EnvironmentContract, Resumable, **SCRIPT)
    passes(EnvironmentContract, Adding)
    passes(EnvironmentContract, but(script=lambda self, prompt: ["3", Action("7")]), **SCRIPT)


async def a_string(self, prompt):
    return Observation(("Guess.",))


async def a_list(self, prompt):
    return [{"role": "user", "content": "Guess."}]


async def bare_tool(self, prompt):
    return Observation(({"role": "user", "content": "Guess."},), ({"name": "f"},))


async def endless(self, action):
    return StepResult(({"role": "user", "content": "again"},), 0.0)


async def infinite(self, action):
    return StepResult((), float("inf"), True)


async def a_tuple(self, action):
    return "again", 0.0, True


async def silent(self, action):
    return StepResult((), 0.0, action.text == "7")


async def parsing(self, action):
    return StepResult(({"role": "user", "content": "no"},), 0.0, int(action.text) == self.secret)


async def first_call(self, action):
    return StepResult(({"role": "user", "content": "no"},), 0.0, action.tool_calls[0].arguments["n"] == 7)


async def shared(self, action):
    Guess.count = getattr(Guess, "count", 0) + 1
    return StepResult(({"role": "user", "content": f"{Guess.count} tries"},), 0.0, action.text == "7")


async def noisy(self, action):
    return StepResult(({"role": "user", "content": "?"},), random.random(), action.text == "7")


async def first_result(self, action):
    step = await ToolEnvironment.step(self, action)
    return replace(step, messages=step.messages[:1])


async def last_first(self, action):
    step = await ToolEnvironment.step(self, action)
    return replace(step, messages=step.messages[::-1])


async def blocking(self, action):
    time.sleep(0.6)
    return await Guess.step(self, action)


async def close_once(self):
    del self.secret


def test_wrong_ones_are_caught(catches):
    catches(
        EnvironmentContract,
        {
            "test_the_first_observation_can_be_rendered": [
                but(reset=a_string),
                but(reset=a_list),
                but(reset=bare_tool),
            ],
            "test_a_scripted_episode": [but(step=endless), but(step=infinite), but(step=a_tuple)],
            "test_a_step_that_goes_on_says_something": [but(step=silent)],
            "test_malformed_actions_are_answered": [but(step=parsing), but(step=first_call)],
            "test_parallel_calls_are_answered_in_their_order": [
                but(Adding, step=first_result),
                but(Adding, step=last_first),
            ],
            "test_two_at_once_do_not_meet": [but(step=shared)],
            "test_the_same_actions_lead_to_the_same_end": [but(step=noisy)],
            "test_closing": [but(close=close_once)],
            "test_a_half_finished_episode_goes_on_elsewhere": [
                but(Resumable, state_dict=lambda self: {"secret": self.secret, "tries": 0}),
                but(Resumable, load_state_dict=lambda self, state: None),
                but(Resumable, state_dict=lambda self: {"self": self}),
            ],
            "test_it_keeps_to_limits": [but(limits={"calls": 3}), but(step=shared)],
            "test_no_call_blocks_the_event_loop": [but(step=blocking)],
            "test_its_script_leads_to_the_end": [
                but(script=lambda self, prompt: ["3"]),
                but(script=lambda self, prompt: [3]),
                but(step=parsing, script=lambda self, prompt: ["seven"]),
            ],
        },
        **SCRIPT,
    )
