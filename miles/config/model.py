"""`model`: which model, and how it is named and changed."""

from __future__ import annotations

from typing import Annotated

from miles.config.base import ComponentSpec, ComponentSpecs, Flag, Section, Spec


class ModelSection(Section):
    hf_checkpoint: Annotated[str | None, Flag("--hf-checkpoint")] = None
    """Folder or hub name of a Hugging Face checkpoint: config, tokenizer, weights."""
    revision: Annotated[str | None, Flag("--hf-revision")] = None
    """Branch, tag or commit of a hub checkpoint."""
    trust_remote_code: Annotated[bool, Flag("--trust-remote-code")] = False
    """Let a checkpoint run its own Python code."""
    random_init: Annotated[bool, Flag("--random-init")] = False
    """Take config and tokenizer from the checkpoint, but initialise the weights from the seed."""
    bridge: Annotated[ComponentSpec, Flag("--bridge")] = Spec(name="auto")
    """How the family's weights are named in each world; `auto` goes by the checkpoint's model type."""
    transforms: Annotated[ComponentSpecs, Flag("--model-transforms")] = ()
    """Changes to the built model, in order: LoRA, freezing."""
    ref_load: Annotated[str | None, Flag("--ref-load")] = None
    """Checkpoint of the reference model; the policy's own start when not given."""
