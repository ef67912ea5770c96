"""`Component`: what a plugin says of one thing it offers, without importing it.

Dry-run, placement, help texts, `miles plugins` and the generated tables read components; only building one imports
its target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Need = Literal[
    "advantages",
    "reference",
    "critic",
    "teacher",
    "teacher_logits",
    "teacher_top_k",
    "greedy_rollout",
    "entropy",
    "logits",
    "kl",
    "environment",
    "rollout_log_probs",
    "routed_experts",
]


TEACHER_LOGITS: frozenset[Need] = frozenset({"teacher_logits", "teacher_top_k"})
"""Whole distributions, or the likeliest tokens (as many as the option `k` says)."""
TEACHER_NEEDS: frozenset[Need] = TEACHER_LOGITS | {"teacher"}
"""These, or log-probs of the sampled tokens."""


@dataclass(frozen=True)
class Component:
    """A named, buildable part.

    Example:
        Component("miles_grpo.grpo:grpo", options=GrpoOptions, summary="Group-relative advantages",
                  paper="arXiv:2402.03300", flags={"--grpo-epsilon": "epsilon"})
    """

    target: str
    """`package.module:attribute`, imported when the component is built. See `miles.protocols` for how it is called."""
    options: type | None = None
    """A dataclass or pydantic model: its fields are the component's options in a config. If it has a method
    `preflight()`, that is called before anything is built, by `--dry-run` too: it raises what would stop the build,
    such as the `PluginLoadError` of a function that an option names and nobody can import."""
    needs: frozenset[Need] | set[Need] = frozenset()
    """What the core must provide for it, beyond what its kind always gets."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Command-line flag -> option, for flags that users of other frameworks know. A flag whose option is empty selects
    the component itself: with `{"--use-tis": ""}`, `--use-tis` is `--is-correction tis`. In a list it adds the
    component, once. Where a kind has several places in a config, it is the first, or the one that `provides` names."""
    provides: tuple[str, ...] = ()
    """What it is the automatic choice for (`auto`). Bridges, chat formats: Hugging Face model types; a chat format for
    all the others says `any`. Generate functions: `one turn`, `turns` (with an environment), `given responses` (no
    engine). An engine that generates says `responses`: task sets without a reward are then refused; one that spreads
    over `several gpus` says so too, and one that speaks to servers `elsewhere`. An executor that starts a single train
    rank says `one rank`, one that starts workers on this machine alone `one node`: more are then refused. A weight sync
    says which engines it reaches: those `beside` the trainer in its processes, those `apart` in workers of their own,
    servers `elsewhere`. A term of the advantages says `algorithm.advantage_terms`, one of the rewards
    `data.reward_terms`: there a flag selects it, and errors say to. A flag of its own that stands here too selects it
    where it is given a value: with `{"--custom-rm-path": "path"}`, `--custom-rm-path my.f` is both. An estimator, a
    term or a loss that looks at no reward says `without rewards`: task sets and samples then need none."""
    summary: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        module, _, attribute = self.target.partition(":")
        if not module or not attribute:
            raise ValueError(f"a component's target is 'package.module:attribute', not {self.target!r}")
