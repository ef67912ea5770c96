"""Reward `search_r1`: exact match of the answer, with terms for the form and for what was found.

|                            | valid conversation                           | invalid |
|----------------------------|----------------------------------------------|---------|
| right answer               | score                                        | score - structure_format_score |
| wrong answer               | structure_format_score (+ retrieval_score)   | final_format_score |
| no answer                  |                                              | 0       |

Only what the model says is an answer, and only what the environment says is information: neither an example in the
prompt, nor the environment's reminder of the tags, nor information that the model makes up counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from miles.api import DataError, Message, Prompt, Sample, Score
from miles_search_r1.notation import is_valid
from miles_search_r1.plugin import RewardOptions

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
INFORMATION = re.compile(r"<information>(.*?)</information>", re.DOTALL)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SearchR1Reward:
    """Judges a conversation of the environment `search_r1`, or a response in its notation."""

    def __init__(self, options: RewardOptions):
        self.options = options

    async def score(self, sample: Sample) -> Score:
        """`reward`, and of 0 and 1: `exact_match`, `answered`, `valid_format`, `retrieved` (what was found has it).

        Raises:
            DataError: the prompt's label holds no answer.
        """
        options = self.options
        targets = [normalized(target) for target in targets_in(sample.prompt)]
        said, found = conversation_of(sample)
        answers = [answer for turn in said for answer in ANSWER.findall(turn)]
        right = bool(answers) and normalized(answers[-1]) in targets
        blocks = [normalized(block) for block in INFORMATION.findall(found)]
        retrieved = any(f" {target} " in f" {block} " for target in targets if target for block in blocks)
        valid = len(INFORMATION.findall(sample.text)) == len(blocks)
        valid = valid and is_valid(sample.text, options.prompt_opens_thoughts)
        if right:
            reward = options.score if valid else options.score - options.structure_format_score
        elif valid:
            reward = options.structure_format_score + options.retrieval_score * retrieved
        else:
            reward = options.final_format_score if answers else 0.0
        parts = {"exact_match": right, "answered": bool(answers), "valid_format": valid, "retrieved": retrieved}
        return {"reward": reward, **{name: float(value) for name, value in parts.items()}}


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and surplus blanks (SQuAD's rule, Rajpurkar et al., 2016).

    Where that would leave nothing (the grade A, The The), articles stay, and then punctuation: else no answer at all
    would be the right one.
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    kept = _ARTICLES.sub(" ", bare)
    return next((" ".join(words) for words in (kept.split(), bare.split(), text.split()) if words), "")


def targets_in(prompt: Prompt) -> list[str]:
    """The accepted answers: a label that is one, a list of them, or `{"ground_truth": {"target": ...}}`.

    Raises:
        DataError: the label is none of these.
    """
    label: Any = prompt.label
    for key in ("ground_truth", "target"):
        if isinstance(label, dict):
            label = label.get(key, label)
    targets = label if isinstance(label, list | tuple) else [label]
    if not targets or not all(isinstance(target, str | int | float) for target in targets):
        raise DataError(
            f"prompt {prompt.id}: its label {prompt.label!r} holds no answer; a text, a list of them, or "
            '{"ground_truth": {"target": [...]}} is expected (keys.label, --label-key)'
        )
    return [str(target) for target in targets]


def conversation_of(sample: Sample) -> tuple[list[str], str]:
    """`(what the model said in each turn, what it was told)` after the prompt: no tag of one turn is closed by another.
    A response without messages is all the model's."""
    messages: Sequence[Message] = sample.messages[len(sample.prompt.messages or []) :]
    if not messages:
        return [sample.text], ""
    said = [
        f"{message.get('reasoning_content', '')}{message['content']}"
        for message in messages
        if message["role"] == "assistant"
    ]
    told = (str(message["content"]) for message in messages if message["role"] != "assistant")
    return said, "".join(told)
