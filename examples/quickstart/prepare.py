"""Makes everything that the quickstart trains on: an arithmetic task and a tiny Qwen3 that has learnt nothing yet.

    python prepare.py --out data --seed 1

The task is `123+456=` -> `0579`, always with four digits. The model is warmed up by imitating a careless pupil
(`sft.jsonl`), who forgets each carry with probability `FORGETS`. Imitation does not do better than its teacher: to a
sum with a carry, the likeliest answer is a wrong one. Reinforcement learning then sees other sums (`train.jsonl`), and
only whether an answer is right.

    sft.jsonl      {"input": "123+459=", "label": "0572"}   the pupil's answers, many of them wrong
    train.jsonl    {"input": "123+459=", "label": "0582"}   prompts; the label is what the reward compares with
    dev.jsonl      the same, to tune by
    heldout.jsonl  the same, to report
    model/         config, tokenizer (bytes, ChatML) and random weights, as AutoModel and AutoTokenizer load them

No two files share a sum, in either order of its operands. One seed gives the same files every time; the weights are
the same for one version of torch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SIZES = {"sft": 20_000, "train": 20_000, "dev": 500, "heldout": 1_000}
DIGITS = 3
FORGETS = 0.65

PAD, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sums(rng: random.Random) -> Iterator[tuple[int, int]]:
    """Pairs of three-digit numbers, without end; none comes twice, in either order."""
    seen = set()
    while True:
        a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
        if (a, b) not in seen:
            seen |= {(a, b), (b, a)}
            yield a, b


def careless_sum(a: int, b: int, rng: random.Random) -> str:
    """Column addition, in four digits, by a pupil who forgets each carry with probability `FORGETS`."""
    written, carry = "", 0
    for column in range(DIGITS):
        total = a // 10**column % 10 + b // 10**column % 10 + carry
        written = str(total % 10) + written
        carry = total // 10 if rng.random() >= FORGETS else 0
    return str(carry) + written


def task(seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of every split."""
    rng = random.Random(seed)
    pairs = sums(rng)
    splits = {}
    for split, size in SIZES.items():
        splits[split] = [
            {"input": f"{a}+{b}=", "label": careless_sum(a, b, rng) if split == "sft" else f"{a + b:04}"}
            for a, b in (next(pairs) for _ in range(size))
        ]
    return splits


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (its id is the byte), and three special tokens."""
    alphabet = {ord(char): char for char in ByteLevel.alphabet()}
    shifted = iter(sorted(code for code in alphabet if code > 255))  # for bytes that have no visible character
    vocab = {alphabet.get(byte) or chr(next(shifted)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, TURN_BEGIN, TURN_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


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


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(out: Path, seed: int) -> None:
    """Write the splits and the untrained checkpoint into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in task(seed).items():
        write_jsonl(out / f"{split}.jsonl", rows)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(out / "model")
    build_model(tokenizer, seed).save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the task and of the model's random weights")
    args = parser.parse_args()
    prepare(args.out, args.seed)
    print(f"wrote {', '.join(f'{split}.jsonl ({size})' for split, size in SIZES.items())} and model/ to {args.out}")
