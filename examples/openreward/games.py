"""Two small text games, served as OpenReward environments are: on this machine, and without an account.

    python games.py --port 8080

HigherLower   one of three numbers is to be found with two guesses: `guess` says whether it is higher or lower
Coin          one of ninety boxes holds a coin, and one may be opened: `open_box`. Where it is, `read_note` says
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OPENREWARD_LOG_LEVEL", "ERROR")  # else the server writes a line for each request

from openreward.environments import Environment, JSONObject, Server, TextBlock, ToolOutput, tool
from pydantic import BaseModel

WIDTH = 3
"""Numbers among which one is to be found: two guesses are enough for who begins in the middle."""


class Guess(BaseModel):
    number: int


class HigherLower(Environment):
    """Pays 1 for the number. How many guesses there are is a matter of who plays: `max_turns`."""

    @classmethod
    def list_splits(cls) -> list[str]:
        return ["train"]

    @classmethod
    def list_tasks(cls, split: str) -> list[JSONObject]:
        return [{"lowest": low, "number": low + i} for low in (1, 4, 7) for i in range(WIDTH)]

    def get_prompt(self) -> list[TextBlock]:
        low = self.task_spec["lowest"]
        return [TextBlock(text=f"Find the number from {low} to {low + WIDTH - 1}.")]

    @tool
    async def guess(self, args: Guess) -> ToolOutput:
        """Guess the number."""
        number = self.task_spec["number"]
        if args.number == number:
            return ToolOutput(blocks=[TextBlock(text="found")], reward=1.0, finished=True)
        return ToolOutput(blocks=[TextBlock(text="higher" if args.number < number else "lower")])


class Box(BaseModel):
    box: int


class Coin(Environment):
    """Pays 1 for the box with the coin; any other box ends the game without."""

    @classmethod
    def list_splits(cls) -> list[str]:
        return ["train", "test"]

    @classmethod
    def list_tasks(cls, split: str) -> list[JSONObject]:
        return [{"box": box} for box in range(10, 100) if (box % 7 == 0) == (split == "test")]

    def get_prompt(self) -> list[TextBlock]:
        return [TextBlock(text="A coin is in one of the boxes 10 to 99. Open one.")]

    @tool
    async def read_note(self) -> ToolOutput:
        """Read the note that lies beside the boxes."""
        return ToolOutput(blocks=[TextBlock(text=f"It is in box {self.task_spec['box']}.")])

    @tool
    async def open_box(self, args: Box) -> ToolOutput:
        """Open a box."""
        found = args.box == self.task_spec["box"]
        return ToolOutput(blocks=[TextBlock(text="a coin" if found else "nothing")], reward=float(found), finished=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080)
    Server([HigherLower, Coin]).run(host="127.0.0.1", port=parser.parse_args().port)
