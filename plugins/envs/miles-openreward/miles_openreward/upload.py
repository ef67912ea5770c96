"""Trajectories on their way to openreward.ai: handed over and forgotten. Nothing here blocks a run, or fails it."""

from __future__ import annotations

import atexit
import json
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from openreward import (
    AssistantMessage,
    OpenReward,
    ReasoningItem,
    RolloutAPI,
    RolloutInfo,
    SystemMessage,
    ToolCall,
    ToolResult,
    UploadType,
    UserMessage,
)

from miles.api import Action, Message

logger = logging.getLogger("miles")
WAITING = 1000
"""Trajectories that wait at most; more are left out."""
THREADS = 4
EXIT = 10.0
"""Seconds that the end of the process waits for what is still to be uploaded."""
SPEAKERS = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


@dataclass
class Transcript:
    """A conversation in the order it happened, with what was paid."""

    rollout: dict[str, Any]
    """Arguments of `RolloutAPI.create`: the run's name, and whose task it is."""
    task_index: int | None = None
    events: list[tuple[UploadType, float | None, bool]] = field(default_factory=list)
    """Message, reward, and whether it ended the episode."""
    turns: int = 0

    def asked(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            speaker = SPEAKERS.get(message["role"], UserMessage)
            self.events.append((speaker(str(message.get("content") or "")), None, False))

    def said(self, action: Action) -> None:
        self.turns += 1
        said: list[UploadType] = [ReasoningItem(action.reasoning)] if action.reasoning else []
        said += [AssistantMessage(action.text)] if action.text or not action.tool_calls else []
        said += [ToolCall(c.name or "?", json.dumps(c.arguments), self._id(c.id)) for c in action.tool_calls]
        self.events += [(message, None, False) for message in said]

    def answered(self, message: Message, reward: float | None = None, finished: bool = False) -> None:
        text = str(message.get("content") or "")
        answer = ToolResult(text, self._id(message["tool_call_id"])) if message["role"] == "tool" else UserMessage(text)
        self.events.append((answer, reward, finished))

    def _id(self, call: str) -> str:
        return f"{self.turns}-{call}"  # calls are numbered in each turn; the site matches results across all


class Uploader:
    """A queue, and threads which take from it."""

    def __init__(self, waiting: int = WAITING):
        self.api: RolloutAPI = OpenReward().rollout
        self._queue: queue.Queue[Transcript] = queue.Queue(waiting)
        self._told = False
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True, name="openreward upload").start()
        atexit.register(self.drain)  # after the SDK's own, which therefore closes later

    def put(self, transcript: Transcript) -> None:
        try:
            self._queue.put_nowait(transcript)
        except queue.Full:
            self._tell("they come faster than openreward.ai takes them")

    def drain(self, seconds: float = EXIT) -> None:
        """Wait until everything has been handed to the SDK, at most so long."""
        deadline = time.monotonic() + seconds
        while self._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)

    def _work(self) -> None:
        while True:
            transcript = self._queue.get()
            try:
                self._send(transcript)
            except Exception as error:
                self._tell(f"{type(error).__name__}: {error}")
            finally:
                self._queue.task_done()

    def _send(self, transcript: Transcript) -> None:
        rollout = self.api.create(**transcript.rollout)
        if getattr(rollout, "_rollouts_disabled", False):  # the SDK has no other way to say so
            self._tell("the SDK could not begin one")
            return
        index = transcript.task_index
        info = None if index is None else RolloutInfo(task_index=index, harness="miles")
        for message, reward, finished in transcript.events:
            rollout.log(message, reward=reward, is_finished=finished, rollout_info=info)
            info = None  # said once

    def _tell(self, why: str) -> None:
        """Once is enough; the run does not depend on it."""
        if not self._told:
            self._told = True
            logger.warning("openreward: not all trajectories are uploaded, and the run goes on: %s", why)


@cache
def uploader() -> Uploader:
    """That of this process."""
    return Uploader()
