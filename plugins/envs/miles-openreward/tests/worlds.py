"""Environments as people write them for OpenReward, and a server for them in a thread of its own."""

import asyncio
import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import HTTPException
from openreward.environments import (
    Environment,
    ImageBlock,
    Message,
    ReasoningBlock,
    Server,
    TextBlock,
    ToolCallBlock,
    ToolOutput,
    ToolResultBlock,
    terminal,
    tool,
)
from pydantic import BaseModel, Field

OPEN = set()
"""Environments that were made and not torn down: one for each session."""


class World(Environment):
    """Counts who is there."""

    def __init__(self, task_spec=None, secrets=None):
        super().__init__(task_spec, secrets)
        self.secrets = secrets
        OPEN.add(self)

    def teardown(self):
        OPEN.discard(self)

    @classmethod
    def list_splits(cls):
        return ["train", "test"]

    @classmethod
    def list_tasks(cls, split):
        return [{"goal": goal} for goal in range(1, 11 if split == "train" else 4)]

    def get_prompt(self):
        return [TextBlock(text=f"Reach {self.task_spec['goal']}."), TextBlock(text="Begin at 0.")]


class Step(BaseModel):
    by: int


class Counter(World):
    """Pays 0.25 for each step, and 1 for reaching the goal."""

    def setup(self):
        self.at = 0

    @tool
    async def move(self, step: Step) -> ToolOutput:
        """Go on."""
        self.at += step.by
        there = self.at == self.task_spec["goal"]
        return ToolOutput(blocks=[TextBlock(text=f"at {self.at}")], reward=1.0 if there else 0.25, finished=there)

    @tool
    async def look(self) -> ToolOutput:
        """Where am I?"""
        return ToolOutput(blocks=[TextBlock(text=f"at {self.at}"), TextBlock(text="of many")])


class Answer(BaseModel):
    text: str = Field(max_length=100)


class Exam(Counter):
    """Takes a plain message as the answer."""

    @terminal
    @tool
    async def submit(self, answer: Answer) -> ToolOutput:
        return ToolOutput(
            blocks=[TextBlock(text="graded")], reward=float(answer.text == str(self.task_spec["goal"])), finished=True
        )


class Dialogue(Counter):
    """Begins in the middle of a conversation."""

    def get_messages(self):
        call = ToolCallBlock(id="c", name="move", input={"by": 2})
        return [
            Message(role="system", blocks=[TextBlock(text="Be brief.")]),
            Message(role="user", blocks=[TextBlock(text="Go.")]),
            Message(role="assistant", blocks=[ReasoningBlock(text="Two?"), call]),
            Message(role="user", blocks=[ToolResultBlock(tool_call_id="c", blocks=[TextBlock(text="at 2")])]),
        ]


class Picture(World):
    def get_prompt(self):
        return [ImageBlock(data="", mimeType="image/png")]

    @tool
    async def look(self) -> ToolOutput:
        return ToolOutput(blocks=[ImageBlock(data="", mimeType="image/png")])


class Failing(World):
    """Breaks where its task says."""

    def __init__(self, task_spec=None, secrets=None):
        if task_spec["goal"] == 1:
            raise RuntimeError("no room")
        super().__init__(task_spec, secrets)

    def setup(self):
        if self.task_spec["goal"] == 2:
            raise RuntimeError("no sandbox")

    @tool
    async def move(self, step: Step) -> ToolOutput:
        raise RuntimeError(f"the floor gave way; the key was {self.secrets.get('floor_key')}")


class Slow(World):
    """Takes its time: to be made, in the task 1, and for each step, in the others."""

    def __init__(self, task_spec=None, secrets=None):
        if task_spec["goal"] == 1:
            time.sleep(0.5)
        super().__init__(task_spec, secrets)

    @tool
    async def move(self, step: Step) -> ToolOutput:
        await asyncio.sleep(step.by)
        return ToolOutput(blocks=[TextBlock(text="arrived")], reward=1.0, finished=True)


class Label(BaseModel):
    key: str = Field("open-sesame-17", description="Such as open-sesame-17.")


class Gossip(World):
    """Tells what it was told in confidence, to whoever calls and whoever answers; breaks in the task 2."""

    @tool
    async def tell(self) -> ToolOutput:
        return ToolOutput(blocks=[TextBlock(text=repr(self.secrets))])

    @terminal
    @tool
    async def submit(self, answer: Answer) -> ToolOutput:
        if self.task_spec["goal"] == 2:
            raise RuntimeError(f"cannot grade with {self.secrets}")
        return ToolOutput(blocks=[TextBlock(text=repr(self.secrets))], reward=1.0, finished=True)


class Labelled(World):
    """Its tools say what should be kept."""

    @tool
    async def ask(self, answer: Label) -> ToolOutput:
        """Ask with open-sesame-17."""
        return ToolOutput(blocks=[])


class Thinker(World):
    """Takes half a minute to grade."""

    @terminal
    @tool
    async def submit(self, answer: Answer) -> ToolOutput:
        await asyncio.sleep(30)
        return ToolOutput(blocks=[], finished=True)


class Huge(World):
    """Has too many tasks to list them."""

    @classmethod
    def list_tasks(cls, split):
        raise HTTPException(400, "list_tasks is not supported")

    @classmethod
    async def num_tasks(cls, split):
        return 1_000_000

    @classmethod
    async def get_task(cls, split, index):
        return {"goal": index}

    @tool
    async def look(self) -> ToolOutput:
        return ToolOutput(blocks=[])


WORLDS = [Counter, Exam, Dialogue, Picture, Failing, Slow, Gossip, Labelled, Thinker, Huge]


@contextmanager
def served(app):
    """Address of an ASGI application on loopback."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


REFUSED = {}
"""Path -> status with which the server answers there, whatever it did."""


def worlds():
    inner = Server(WORLDS).app

    async def unheard(message):
        pass

    async def app(scope, receive, send):
        status = REFUSED.get(scope.get("path"))
        await inner(scope, receive, send if status is None else unheard)
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"cannot, with open-sesame-17"})

    return app


def row(environment, goal=4, **metadata):
    """Metadata of a task, as prepare_tasks writes it."""
    return {
        "server_name": environment,
        "environment_name": environment.lower(),
        "namespace": None,
        "task_spec": {"goal": goal},
        "variant": environment.lower(),
        "split": "train",
        "index": goal - 1,
        **metadata,
    }
