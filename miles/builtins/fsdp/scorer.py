"""A causal language model that answers with log-probabilities, entropies and values instead of logits.

Everything that touches the head's weight happens inside `forward`: FSDP2 gathers the weights of this module, which is
its root, before forward and frees them after backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from miles.api import Want
from miles.builtins.fsdp.attention import PackedLayout
from miles.toolkit import selected_log_probs

if TYPE_CHECKING:
    from miles.builtins.fsdp.ulysses import TokenSlice


class TokenScorer(nn.Module):
    """A transformers model and, for a critic, a value head.

    Args:
        lm: a transformers causal LM: `base_model` gives hidden states, `get_output_embeddings()` is the head.
        compiled: compile what is done to the logits.
        critic: add a value head `[1, H]`, at least float32 whatever the model's dtype; drawn from N(0, 0.02).
    """

    lm: Any

    def __init__(self, lm: nn.Module, *, temperature: float, chunk_size: int, critic: bool, compiled: bool = False):
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.compiled = compiled
        self.value_head = value_head(self.lm) if critic else None

    @property
    def routes(self) -> bool:
        """Whether the model's config asks for its router-balance loss."""
        return bool(getattr(self.lm.config, "output_router_logits", False))

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        packed: PackedLayout,
        want: frozenset[Want],
        part: TokenSlice | None = None,
    ) -> dict[str, Tensor]:
        """`log_probs`, `entropy`, `values` as wanted, each `[T]` and aligned with the tokens, 0 where a sample starts;
        `before` `[U, H]`, the hidden state that predicts each computed token; `router_balance`, before its coefficient,
        when the config asks for it. With a `part` this rank computes that of `U` alone, and `before` is of it."""
        tree = packed.tree
        tokens_U, positions_U = tree.computed(tokens_T), tree.computed(positions_T)
        predicted_U = positions_U > 0
        asked: dict[str, Any] = {"output_router_logits": True} if self.routes else {}
        if part is not None:
            tokens_U, positions_U = part.cut(tokens_U), part.cut(positions_U)
            asked["part"] = part
        decoded = self.lm.base_model(
            input_ids=tokens_U.unsqueeze(0),
            position_ids=positions_U.unsqueeze(0),
            use_cache=False,
            packed=packed,
            **asked,
        )
        before_UH = (part or tree).predecessors(decoded.last_hidden_state[0])
        columns: dict[str, Tensor | None] = {}
        if want & {"log_probs", "entropy"}:
            columns["log_probs"], columns["entropy"] = selected_log_probs(
                before_UH,
                self.lm.get_output_embeddings(),
                tokens_U,
                temperature=self.temperature,
                chunk_size=self.chunk_size,
                entropy="entropy" in want,
                compiled=self.compiled,
            )
        if self.value_head is not None and "values" in want:
            columns["values"] = self.value_head(before_UH.to(self.value_head.weight.dtype)).squeeze(-1)
        found = {
            name: tree.spread(torch.where(predicted_U, part.gather(values_U) if part else values_U, 0.0))
            for name, values_U in columns.items()
            if values_U is not None
        }
        found["before"] = before_UH
        if self.routes:
            logits = [part.gather(logits_UE) for logits_UE in decoded.router_logits] if part else decoded.router_logits
            found["router_balance"] = router_balance(logits, self.lm.config)
        return found

    def logits(self, before_XH: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """`[X, V]` at the temperature, at least float32; `head` is this model's, or a copy of it."""
        logits = head(before_XH)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature


def value_head(lm: Any) -> nn.Linear:
    wide = torch.promote_types(lm.get_input_embeddings().weight.dtype, torch.float32)
    head = nn.Linear(lm.config.get_text_config().hidden_size, 1, dtype=wide, device="cpu")
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def router_balance(router_logits: Sequence[Tensor], config: Any) -> Tensor:
    """`E * sum_e f_e P_e` over the tokens of all layers: `f_e` the share of tokens sent to expert `e` (summing to the
    number of experts a token), `P_e` its mean probability. Switch Transformers, arXiv:2101.03961, eq. 4."""
    experts = next(getattr(config, key) for key in ("num_experts", "num_local_experts") if hasattr(config, key))
    logits_XE = torch.cat([layer.reshape(-1, experts) for layer in router_logits])
    probs_XE = logits_XE.softmax(-1, torch.promote_types(logits_XE.dtype, torch.float32))
    chosen_XK = probs_XE.topk(config.num_experts_per_tok, dim=-1).indices
    shares_E = functional.one_hot(chosen_XK, experts).sum((0, 1)) / len(probs_XE)
    return experts * (shares_E * probs_XE.mean(0)).sum()
