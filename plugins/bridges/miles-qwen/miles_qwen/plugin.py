"""Registers the bridge and the chat format."""

from miles.api import Component, hookimpl

MILES_API = 1


@hookimpl
def miles_register_bridges():
    return {
        "qwen": Component(
            "miles_qwen.bridge:QwenBridge",
            provides=("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
            summary="Qwen2 and Qwen3, dense and mixture of experts",
        )
    }


@hookimpl
def miles_register_chat_formats():
    return {
        "qwen3": Component(
            "miles_qwen.chat:Qwen3Chat",
            provides=("qwen3", "qwen3_moe"),
            summary="Qwen3's conversations: thinking, tool calls",
        )
    }
