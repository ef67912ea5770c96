"""What both sides of a comparison get: a model, a tokenizer, prompts, a reward. Made from a seed, nothing downloaded.

The model is a random Qwen3 of 4 layers and 0.8 million parameters; a token is a byte; a prompt is random letters; the
reward is the share of characters of the response that are digits, which is dense and learned within 40 rollouts.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

BYTES = 256


@dataclass(frozen=True)
class Task:
    """One setting of the comparison. A rollout batch is `prompts * samples` responses, trained on in one step."""

    prompts: int = 8
    samples: int = 8
    prompt_len: int = 16
    response_len: int = 64
    ends: bool = False
    """Whether the model can end a response; if not, all have `response_len` tokens."""
    learning_rate: float = 1e-3
    layers: int = 4
    hidden: int = 128

    def write(self, folder: Path, seed: int) -> None:
        """`model/` and `prompts.jsonl`."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        # The token that ends a response: one of the model's vocabulary, or one just outside, which cannot be drawn.
        vocabulary = BYTES + 3 if self.ends else BYTES
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden // 4,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=BYTES + 2,
        )
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        draw = random.Random(seed)
        rows = [{"input": "".join(draw.choices(string.ascii_lowercase, k=self.prompt_len))} for _ in range(512)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokenizer():
    """One token a byte; pad, bos and eos after these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ("<pad>", "<bos>", "<eos>")
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*alphabet, *special])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def digits(text: str) -> float:
    """The reward: share of digits among the characters."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


FIXED = Task()
VARIABLE = Task(ends=True, response_len=256)
SHARED_PROMPT = Task(prompt_len=512)
SETTINGS = {"fixed": FIXED, "variable": VARIABLE, "shared_prompt": SHARED_PROMPT}


class Turns:
    """Two programs that work in turns: each waits for a line before a rollout, and answers with one after it."""

    def take(self) -> None:
        if not input():
            raise SystemExit(0)

    def give(self, **facts: object) -> None:
        print(json.dumps(facts), flush=True)
