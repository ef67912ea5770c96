"""Makes everything that the recipe trains on: questions, demonstrations, and a tiny Qwen3 that knows nothing.

    python make_data.py --out data --seed 1

A question asks for a number that a line of Python finds, and nobody's head. The demonstrations are those of a pupil who
has an interpreter at hand, and mostly guesses instead. Who imitates him guesses as often. Reinforcement learning then
asks other questions, and says only whether an answer is right.

    sft.jsonl      {"input": [system, question, (call, result,) answer], "tools": [...]}     the pupil's conversations
    train.jsonl    {"input": [system, question], "label": "8976"}                            questions
    heldout.jsonl  the same, to report
    model/         config, tokenizer and random weights, as AutoModel and AutoTokenizer load them

No two rows ask the same. One seed gives the same files every time; the weights are the same for one version of torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from miles_qwen.chat import Qwen3Chat
from miles_retool.environment import Retool
from miles_retool.plugin import RetoolOptions
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles.api import ChatContext, Prompt

SIZES = {"sft": 15_000, "train": 1_000, "heldout": 200}
GUESSES = 0.6
"""How often the pupil does without the interpreter."""
SYSTEM = {"role": "system", "content": "Answer the question. You may run Python."}

KINDS: dict[str, tuple[str, str, Callable[[int, int], int], int]] = {
    "product": ("What is {a} times {b}?", "print({a} * {b})", lambda a, b: a * b, 99_999),
    "divisor": (
        "What is the greatest common divisor of {a} and {b}?",
        "import math\nprint(math.gcd({a}, {b}))",
        math.gcd,
        99,
    ),
    "digits": (
        "What is the sum of the digits of {a} to the power of {b}?",
        "print(sum(map(int, str({a} ** {b}))))",
        lambda a, b: sum(map(int, str(a**b))),
        999,
    ),
    "remainder": (
        "What is {a} to the power of {b}, modulo 97?",
        "print(pow({a}, {b}, 97))",
        lambda a, b: pow(a, b, 97),
        96,
    ),
}
"""Kind -> question, program, what it prints, and the largest number that the pupil would guess."""

VOCABULARY = 1_000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def offered() -> list[dict[str, Any]]:
    """The tool, as the environment shows it to the model."""
    environment = Retool(RetoolOptions(require=()))  # nothing is run
    return list(asyncio.run(environment.reset(Prompt("data", "data", text="?"))).tools)


def asked(kind: str, a: int, b: int) -> list[dict[str, Any]]:
    return [SYSTEM, {"role": "user", "content": KINDS[kind][0].format(a=a, b=b)}]


def answer(kind: str, a: int, b: int) -> int:
    return KINDS[kind][2](a, b)


def conversation(kind: str, a: int, b: int, rng: random.Random) -> list[dict[str, Any]]:
    """What the pupil says to a question."""
    _, program, result, most = KINDS[kind]
    said, number = asked(kind, a, b), rng.randrange(1, most + 1)
    if rng.random() >= GUESSES:
        number = result(a, b)
        call = {"name": "code_interpreter", "arguments": {"code": program.format(a=a, b=b)}}
        said += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": f"Output:\n{number}"},
        ]
    return [*said, {"role": "assistant", "content": f"Answer: \\boxed{{{number}}}"}]


def questions(rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """Kinds and numbers, without end; none comes twice."""
    seen = set()
    while True:
        question = rng.choice(list(KINDS)), rng.randrange(100, 1000), rng.randrange(10, 100)
        if question not in seen:
            seen.add(question)
            yield question


def task(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of every split."""
    rng, tools = random.Random(seed), offered()
    drawn = questions(rng)
    shown = [{"input": conversation(*question, rng), "tools": tools} for question in islice(drawn, SIZES["sft"])]
    others = {
        split: [
            {"input": asked(*question), "label": str(answer(*question))} for question in islice(drawn, SIZES[split])
        ]
        for split in ("train", "heldout")
    }
    return {"sft": shown, **others}


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
    rendered = (chat.render_conversation(row["input"], row["tools"])[0] for row in rows)
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


def make(out: Path, seed: int) -> None:
    """Write the splits and the untrained checkpoint into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = task(seed)
    for split in SIZES:
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
    tokenizer = build_tokenizer(texts_between_tags(rows["sft"][:1_000]))
    tokenizer.save_pretrained(out / "model")
    build_model(tokenizer, seed).save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the task and of the model's random weights")
    args = parser.parse_args()
    make(args.out, args.seed)
    print(f"wrote {', '.join(f'{split}.jsonl ({size})' for split, size in SIZES.items())} and model/ to {args.out}")
