"""Models that SGLang computes otherwise than their checkpoint says, without a word: they are refused.

Its classes (0.5.17) leave fields of the config unread. Tensors for which a class has no place are skipped, places for
which no tensor comes keep what was there, from disk and in a weight sync alike. Families are those of the bridges here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPARSE = frozenset({"qwen2_moe", "qwen3_moe"})
"""`srt/models/qwen2_moe.py`, `qwen3_moe.py`: a head of its own always, and experts in every layer."""
FAMILIES = SPARSE | {"llama", "mistral", "qwen2", "qwen3"}
"""None of them tells its attention of a window. All dense ones tie where the config does."""
SLIDING = FAMILIES - {"llama"}
"""Those that have one. A Llama has none, whatever is left in its config of what it was converted from."""
TORCH = "or let another engine serve it (--rollout-engine torch)"


def misread_checkpoint(name: str, revision: str | None, context_length: int | None) -> str:
    """`misread` before anything is built; empty too for what is still on the hub.

    Args:
        name: a folder, or a name on the hub.
        context_length: that servers are started with; the model's own when None.
    """
    from transformers import AutoConfig

    here: dict[str, Any] = {"revision": revision, "local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(Path(name).expanduser()), **here)
    except (OSError, ValueError):  # it is not here, or needs code of its own, as none of these families does
        return ""
    return misread(config, context_length or getattr(config, "max_position_embeddings", None) or 0)


def misread(config: Any, max_len: int) -> str:
    """What SGLang would do to this model; empty where it serves what the config says.

    Args:
        config: of transformers.
        max_len: tokens of the longest sequence that servers take.
    """
    family = getattr(config, "model_type", "")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    faults = {
        "ignores tie_word_embeddings, and its lm_head would stay unfilled. Save the checkpoint with "
        f"tie_word_embeddings false and a lm_head.weight of its own, {TORCH}": family in SPARSE
        and getattr(config, "tie_word_embeddings", False),
        "ignores mlp_only_layers and decoder_sparse_step, and has experts in every layer: dense ones would be left "
        f"out. Use layers of experts alone, {TORCH}": family in SPARSE
        and (getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) > 1),
        f"ignores the sliding window of {window} tokens, and its servers take sequences of {max_len}. Start them with "
        f"--context-length {window} (a run's own: --sglang-context-length {window}), {TORCH}": family in SLIDING
        and window
        and slides
        and max_len > window,
    }
    found = (fault for fault, present in faults.items() if present)
    return next((f"for {family} models, SGLang (0.5.17) {fault}" for fault in found), "")
