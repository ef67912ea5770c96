"""Makes everything that the recipe trains on: products to find, demonstrations, and a tiny Qwen3 that knows nothing.

    python make_data.py --out data --seed 1

The demonstrations are those of a pupil who is offered a tool that multiplies, and mostly guesses instead. Who imitates
him guesses as often. Reinforcement learning then asks for other products, and only whether an answer is right.

    sft.jsonl      {"input": [question, (call, result,) answer], "tools": [...]}     the pupil's conversations
    train.jsonl    {"input": "What is 374 times 24?", "label": "8976"}               questions
    heldout.jsonl  the same, to report
    model/         config, tokenizer and random weights, as AutoModel and AutoTokenizer load them

No two rows have the same factors. One seed gives the same files every time; the weights are the same for one version
of torch.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from agent import SYSTEM, multiply
from miles_qwen.chat import Qwen3Chat
from strands.models.openai import OpenAIModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles.api import ChatContext

SIZES = {"sft": 15_000, "train": 1_000, "heldout": 200}
GUESSES = 0.6
"""How often the pupil does without the tool."""

VOCABULARY = 1_000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def offered() -> list[dict[str, Any]]:
    """The agent's tools, as strands sends them."""
    request = OpenAIModel(model_id="any").format_request([], [multiply.tool_spec])
    return request["tools"]


def question(a: int, b: int) -> str:
    return f"What is {a} times {b}?"


def conversation(a: int, b: int, rng: random.Random) -> list[dict[str, Any]]:
    """What the pupil says to a question, as chat messages."""
    said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(a, b)}]
    result = rng.randrange(1_000, 100_000)
    if rng.random() >= GUESSES:
        result = a * b
        call = {"type": "function", "function": {"name": multiply.tool_name, "arguments": {"a": a, "b": b}}}
        said += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": str(result)}]
    return [*said, {"role": "assistant", "content": f"It is {result}."}]


def task(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of every split."""
    rng, tools = random.Random(seed), offered()
    pairs = iter(rng.sample([(a, b) for a in range(100, 1000) for b in range(10, 100)], sum(SIZES.values())))
    shown = [{"input": conversation(a, b, rng), "tools": tools} for a, b in islice(pairs, SIZES["sft"])]
    asked = {
        split: [{"input": question(a, b), "label": str(a * b)} for a, b in islice(pairs, SIZES[split])]
        for split in ("train", "heldout")
    }
    return {"sft": shown, **asked}


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
