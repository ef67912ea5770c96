"""Makes a model small enough for a CPU, and demonstrations of a pupil who knows the games and plays them badly.

    python pupil.py --config train_config.yaml --out pupil --seed 1

In HigherLower he guesses anything, and heeds what he was told now and then; in Coin he mostly opens some box without
reading the note. Who imitates him plays as badly; reinforcement learning then finds out what wins.

    sft.jsonl    {"input": [system, question, (call, result,) ... call]}    his games
    model/       a Qwen3 of 0.6 million parameters: config, tokenizer and random weights

One seed gives the same files every time; the weights are the same for one version of torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from games import WIDTH, Coin, HigherLower
from miles_openreward.environment import listed, tool_schema, with_system
from miles_openreward.plugin import system_prompt
from miles_openreward.prepare_tasks import read_config
from miles_qwen.chat import Qwen3Chat
from openreward.environments import Environment
from openreward.environments.session import call_session_tool
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles.api import ChatContext

GAMES = 12_000
HEEDS = 0.5
"""How often a guess is one that can still be right."""
READS = 0.4
"""How often the note is read first."""
VOCABULARY = 1_000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

Said = tuple[dict[str, Any], str]
"""Arguments of a call, and what came of it."""


def guess(game: Environment, so_far: list[Said], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A move in HigherLower: tool and arguments."""
    low = game.task_spec["lowest"]
    possible = range(low, low + WIDTH)
    if rng.random() < HEEDS:
        for arguments, told in so_far:
            number = arguments["number"]
            possible = [n for n in possible if (n > number if told == "higher" else n < number)]
    return "guess", {"number": rng.choice(possible or [low])}


def look_or_open(game: Environment, so_far: list[Said], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A move in Coin."""
    if so_far:
        return "open_box", {"box": int(re.findall(r"\d+", so_far[-1][1])[0])}
    return ("read_note", {}) if rng.random() < READS else ("open_box", {"box": rng.randint(10, 99)})


PLAYERS: dict[type[Environment], Callable[..., tuple[str, dict[str, Any]]]] = {HigherLower: guess, Coin: look_or_open}


async def play(kind: type[Environment], task: Any, template: str, turns: int, rng: random.Random) -> list[dict]:
    """A game of the pupil's, as the model would see it, up to the last call."""
    game = kind(task)
    tools = [tool_schema(spec) for spec in kind.list_tools().tools]
    asked = [{"role": "user", "content": "\n".join(block.text for block in game.get_prompt())}]
    messages: list[dict] = with_system(system_prompt(template, listed(tools)), asked)
    so_far: list[Said] = []
    for turn in range(turns):
        name, arguments = PLAYERS[kind](game, so_far, rng)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        output = (await call_session_tool(game, None, name, arguments)).root.output
        if output.finished or turn == turns - 1:
            break
        so_far.append((arguments, output.blocks[0].text))
        messages.append({"role": "tool", "name": name, "content": so_far[-1][1]})
    return messages


async def demonstrations(config: Path, seed: int) -> list[dict]:
    """Rows of games, of each as many as of the others."""
    train, rng, rows = read_config(config), random.Random(seed), []
    for kind in PLAYERS:
        turns, tasks = train.environments[kind.name()].max_turns, kind.list_tasks("train")
        for _ in range(GAMES // len(PLAYERS)):
            rows.append({"input": await play(kind, rng.choice(tasks), train.system_prompt_template, turns, rng)})
    rng.shuffle(rows)
    return rows


def build_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token, and what is said alike in many of these texts few."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[-1], pad_token=SPECIAL[0], clean_up_tokenization_spaces=False
    )


def texts_between_tags(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What the chat format makes of conversations, cut at its special tokens."""
    tokenizer = build_tokenizer()
    chat = Qwen3Chat(context=ChatContext(tokenizer, {"enable_thinking": False}))
    tags = re.compile("|".join(map(re.escape, (*SPECIAL, *TAGS))))
    rendered = (chat.render_conversation(row["input"])[0] for row in rows)
    return [text for tokens in rendered for text in tags.split(tokenizer.decode(tokens)) if text]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.6 million parameters with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.06,  # the usual 0.02 is for wide models: at this width it delays learning
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def make(config: Path, out: Path, seed: int) -> None:
    """Write demonstrations and the untrained checkpoint into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = asyncio.run(demonstrations(config, seed))
    (out / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = build_tokenizer(texts_between_tags(rows[:1_000]))
    tokenizer.save_pretrained(out / "model")
    build_model(tokenizer, seed).save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="train_config.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the games and of the model's random weights")
    args = parser.parse_args()
    make(args.config, args.out, args.seed)
    print(f"wrote sft.jsonl ({GAMES} games) and model/ to {args.out}")
