"""The bridge and the chat format keep the contracts of their kinds."""

from pathlib import Path

from miles.testing import BridgeContract, ChatFormatContract
from miles.testing.chat import TOOL
from miles.testing.tiny import tokenizer


class TestQwen(BridgeContract):
    name = "qwen"
    worlds = ("hf", "torch", "decoder", "megatron", "megatron_te")


class TestQwenWithDenseLayers(BridgeContract):
    name = "qwen"
    changes = {"num_hidden_layers": 3, "mlp_only_layers": [1]}


class TestQwen3Chat(ChatFormatContract):
    name = "qwen3"
    takes_reasoning = True
    follow_up = TOOL
    forgets = r"<think>\n.*?\n</think>\n\n"

    def tokenizer(self):
        """With a template of the family whose members may think."""
        template = (Path(__file__).parent / "qwen3.jinja").read_text(encoding="utf-8").strip()
        return tokenizer(template.replace("EMPTY_THOUGHTS", "true").replace("OPENING", ""))
