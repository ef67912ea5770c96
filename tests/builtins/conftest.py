"""A byte-level tokenizer with a few merges, so that seams between pieces of text matter."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from miles.api import ChatContext
from miles.builtins.chat_template import TemplateChat

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template=CHATML):
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
    pieces = alphabet + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def tokenizer_with():
    """Template -> tokenizer."""
    return make_tokenizer


@pytest.fixture(scope="session")
def chat_with():
    """Template (and options of the context) -> chat format `template`."""
    return lambda template=CHATML, **options: TemplateChat(context=ChatContext(make_tokenizer(template), **options))


@pytest.fixture(scope="session")
def chat(chat_with):
    return chat_with()
