"""Registers the bridge."""

from miles.api import Component, hookimpl

MILES_API = 1


@hookimpl
def miles_register_bridges():
    return {
        "llama": Component(
            "miles_llama.bridge:LlamaBridge",
            provides=("llama", "mistral"),
            summary="Llama 2 and 3, Mistral, and models that share their architecture",
        )
    }
