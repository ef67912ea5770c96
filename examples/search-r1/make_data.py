"""Makes everything that the recipe trains on: a corpus of made-up facts, questions about them, and a tiny model.

    python make_data.py --out data --seed 1

The facts are drawn by chance: which of 40 towns each of 1,280 inns is in. Nobody can know them, so a question is
answered by finding the passage, or by a guess, which is right once in 40. The demonstrations are those of a pupil who
knows how to search and mostly does not.

    corpus.jsonl    {"id": "0", "contents": "Amber Falcon\\nThe inn Amber Falcon is in Dunmore."}, one line an inn
    sft.jsonl       {"input": what was said so far, "label": the pupil's next turn}
    train.jsonl     {"prompt": [question], "reward_model": {"ground_truth": {"target": ["Dunmore"]}}}, as search-r1's
    heldout.jsonl   the same, to report
    model/          config, tokenizer and random weights, as AutoModel and AutoTokenizer load them

No inn is asked for in two of the files. One seed gives the same files every time; the weights are the same for one
version of torch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from miles_search_r1.notation import Document, information
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SIZES = {"sft": 700, "train": 400, "heldout": 180}
"""Inns that the questions of a file are about."""
DEMONSTRATIONS = 12_000
GUESSES = 0.6
"""How often the pupil does without a search."""
TOPK = 3

FIRST = (
    "Amber Silver Golden Crimson Hollow Quiet Merry Broken Frosty Velvet Copper Ivory Gentle Hungry Drunken "
    "Sleepy Lonely Painted Rusty Shining Wooden Stony Windy Rainy Sunny Cloudy Blue Green Yellow Purple Black "
    "White"
)
SECOND = (
    "Falcon Otter Lantern Anchor Thistle Badger Kettle Raven Orchard Compass Bridge Castle Dragon Eagle Feather "
    "Garden Hammer Island Jacket Kitchen Ladder Mirror Needle Oyster Pillow Rabbit Saddle Table Umbrella Violin "
    "Wagon Candle Barrel Basket Button Carpet Dagger Engine Flower Goose"
)
TOWNS = (
    "Dunmore Velby Harrow Tolmere Ashwick Brennel Corvale Estham Fenwick Grimsby Holt Ilford Jarrow Kelso Ludlow "
    "Malton Norby Oakham Penrith Quorn Ripon Selby Thirsk Ulting Wexford Yarm Zeal Alnwick Bakewell Crewe Darwen "
    "Ely Frome Goole Hexham Ilkley Keswick Leek Morpeth Nantwich"
)

TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/"))
PAD, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONGEST_RESULT = 4_000


@dataclass(frozen=True)
class Inn:
    name: str
    town: str

    @property
    def passage(self) -> Document:
        return Document(self.name, f"The inn {self.name} is in {self.town}.")

    @property
    def question(self) -> list[dict[str, str]]:
        """As chat messages. It shows what an answer looks like, as the prompts of search-r1 do."""
        text = f"Answer like <answer> Dover </answer>.\nQuestion: Where is the inn {self.name}?"
        return [{"role": "user", "content": text}]


def inns(rng: random.Random) -> list[Inn]:
    """All of them, in an order that follows from the seed, as their towns do."""
    towns = TOWNS.split()
    names = [" ".join(pair) for pair in product(FIRST.split(), SECOND.split())]
    return [Inn(name, rng.choice(towns)) for name in rng.sample(names, len(names))]


def neighbours(inn: Inn, others: Sequence[Inn], rng: random.Random) -> list[Inn]:
    """The inn, and some that share a word with it: what a search for its name finds."""
    words = set(inn.name.split())
    alike = [other for other in others if len(words & set(other.name.split())) == 1]
    return [inn, *rng.sample(alike, TOPK - 1)]


def demonstrations(asked: Sequence[Inn], everything: Sequence[Inn], tokenizer: Any, rng: random.Random) -> list[dict]:
    """Turns of the pupil, each with all that was said before it."""
    rows: list[dict] = []
    while len(rows) < DEMONSTRATIONS:
        inn = rng.choice(asked)
        before = tokenizer.apply_chat_template(inn.question, tokenize=False, add_generation_prompt=True)
        if rng.random() < GUESSES:
            turn = f"<think> I remember it. </think><answer> {rng.choice(TOWNS.split())} </answer>"
            rows.append({"input": before, "label": turn})
            continue
        search = f"<think> I look it up. </think><search> inn {inn.name} </search>"
        found = information([near.passage for near in neighbours(inn, everything, rng)], LONGEST_RESULT)
        answer = f"<think> It says so. </think><answer> {inn.town} </answer>"
        rows.append({"input": before, "label": search})
        rows.append({"input": f"{before}{search}{found}", "label": answer})
    return rows


def task(inn: Inn) -> dict[str, Any]:
    return {"prompt": inn.question, "reward_model": {"style": "rule", "ground_truth": {"target": [inn.town]}}}


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of these texts is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, TURN_BEGIN, TURN_END)])
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def texts_of(all_inns: Sequence[Inn]) -> list[str]:
    """What there is to say, without tags, for the tokenizer."""
    said = [
        " I remember it. I look it up. It says so. Nothing was found.\n",
        "user\nassistant\n",
        "Doc 1(Title: Doc 2(",
    ]
    for inn in all_inns:
        question = inn.question[0]["content"]
        for tag in TAGS:
            question = question.replace(tag, "\n")
        said += [f" {inn.name} {inn.town} ", f"Title: {inn.name}) {inn.passage.text}\n", question]
    return said


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.7 million parameters with random weights."""
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


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(out: Path, seed: int) -> None:
    """Write the corpus, the splits and the untrained checkpoint into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    everything = inns(rng)
    passages = [inn.passage for inn in everything]
    corpus = ({"id": str(i), "contents": f"{p.title}\n{p.text}"} for i, p in enumerate(passages))
    write_jsonl(out / "corpus.jsonl", corpus)
    tokenizer = build_tokenizer(texts_of(everything))
    asked = iter(everything)
    splits = {split: [next(asked) for _ in range(size)] for split, size in SIZES.items()}
    write_jsonl(out / "sft.jsonl", demonstrations(splits["sft"], everything, tokenizer, rng))
    for split in ("train", "heldout"):
        write_jsonl(out / f"{split}.jsonl", map(task, splits[split]))
    tokenizer.save_pretrained(out / "model")
    build_model(tokenizer, seed).save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the facts and of the model's random weights")
    args = parser.parse_args()
    make(args.out, args.seed)
    print(f"wrote corpus, sft, train and heldout.jsonl and model/ to {args.out}")
