"""From hidden states to the log-probabilities of given tokens, without ever holding all logits.

A vocabulary of 150,000 makes the fp32 logits of 8,192 tokens 5 GB, and the backward pass would want them several
times. So the head runs on `chunk_size` tokens at a time, keeps one number a token (two with entropy), and in the
backward pass computes the logits of each chunk again. Peak memory is `[chunk_size, V]`, the cost one more product
with the head.

`T` tokens, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def selected_log_probs(
    hidden_TH: Tensor,
    head: nn.Module,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`log softmax(head(hidden) / temperature)` at one target a row, and the entropy of each row's distribution.

    Both carry a gradient to the hidden states and to the head, tied or not. A plain `nn.Linear` takes a fused path; any
    other head (an adapter, a quantised layer) is called as a module and checkpointed chunk by chunk. Under FSDP2 this
    must run inside the forward of the module that owns the head, where its weight is gathered.

    Returns:
        `[T]` log-probabilities and `[T]` entropies (None unless asked for), float32 or wider.
    """
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        fused = _LinearScores.apply(hidden_TH, head.weight, head.bias, targets_T, temperature, chunk_size, entropy)
        return fused if entropy else (fused, None)

    def one_chunk(hidden_CH: Tensor, targets_C: Tensor) -> tuple[Tensor, ...]:
        scores, entropies = log_probs_from_logits(head(hidden_CH), targets_C, temperature, entropy)
        return (scores, entropies) if entropies is not None else (scores,)

    chunks = [
        checkpoint(one_chunk, hidden_CH, targets_C, use_reentrant=False)
        for hidden_CH, targets_C in zip(hidden_TH.split(chunk_size), targets_T.split(chunk_size), strict=True)
    ]
    columns = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return columns[0], columns[1] if entropy else None


def log_probs_from_logits(
    logits_TV: Tensor, targets_T: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same from logits that are there already."""
    log_p_TV = _log_softmax(logits_TV, temperature)
    selected_T = log_p_TV.gather(-1, targets_T.unsqueeze(-1)).squeeze(-1)
    return selected_T, -(log_p_TV.exp() * log_p_TV).sum(-1) if entropy else None


def next_tokens(tokens_T: Tensor) -> Tensor:
    """Entry `t` is `tokens[t + 1]`: what position `t` predicts. The last entry, and that of each sample, is void."""
    return tokens_T.roll(-1)


def align_with_tokens(values_T: Tensor, positions_T: Tensor) -> Tensor:
    """From the position that predicts to the token that is predicted: entry `t` becomes `values[t - 1]`.

    The first token of each sample (position 0) is predicted by nothing and gets 0; so no sample sees another's.
    """
    return torch.where(positions_T > 0, values_T.roll(1), 0.0)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """At the temperature, in at least float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if temperature == 1.0:
        return functional.log_softmax(logits, dim=-1, dtype=wide)  # widens as it reads
    return functional.log_softmax(logits.to(wide) / temperature, dim=-1)


class _LinearScores(torch.autograd.Function):
    """Log-probabilities and entropies of a linear head, chunked in both directions.

    With `p = softmax(z)`, `z = (h W^T + b) / temperature`, `H` the entropy and `g`, `e` the incoming gradients:
    `dz = g (onehot - p) - e p (log p + H)`. The gradient of the weight is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        chunk_size: int,
        entropy: bool,
    ) -> Any:
        columns: list[tuple[Tensor, Tensor | None]] = [
            log_probs_from_logits(functional.linear(hidden_CH, weight_VH, bias_V), targets_C, temperature, entropy)
            for hidden_CH, targets_C in zip(hidden_TH.split(chunk_size), targets_T.split(chunk_size), strict=True)
        ]
        log_probs_T = torch.cat([selected for selected, _ in columns])
        entropy_T = torch.cat([e for _, e in columns if e is not None]) if entropy else None
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, entropy_T)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        return log_probs_T if entropy_T is None else (log_probs_T, entropy_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor | None, grad_entropy_T: Tensor | None = None) -> Any:
        hidden_TH, weight_VH, bias_V, targets_T, entropy_T = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if need_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if need_bias else None
        for start in range(0, len(hidden_TH), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            hidden_CH, targets_C = hidden_TH[rows], targets_T[rows]
            grad_CV = _logits_gradient(
                _log_softmax(functional.linear(hidden_CH, weight_VH, bias_V), ctx.temperature),
                targets_C,
                None if grad_T is None else grad_T[rows],
                None if grad_entropy_T is None else (grad_entropy_T[rows], entropy_T[rows]),
            )
            if ctx.temperature != 1.0:
                grad_CV.div_(ctx.temperature)
            grad_CV = grad_CV.to(hidden_TH.dtype)
            if grad_hidden_TH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_hidden_TH[rows])
            if grad_weight_VH is not None:
                grad_weight_VH += grad_CV.t() @ hidden_CH
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
        grad_weight_VH = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_TH, grad_weight_VH, grad_bias_V, None, None, None, None


def _logits_gradient(
    log_p_CV: Tensor, targets_C: Tensor, grad_C: Tensor | None, of_entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`g (onehot - p) - e p (log p + H)`; `of_entropy` is `(e, H)`."""
    p_CV = log_p_CV.exp()
    coefficient_CV = torch.zeros_like(log_p_CV[:, :1]) if grad_C is None else -grad_C.unsqueeze(-1)
    if of_entropy is not None:
        grad_entropy_C, entropy_C = of_entropy
        coefficient_CV = coefficient_CV - grad_entropy_C.unsqueeze(-1) * (log_p_CV + entropy_C.unsqueeze(-1))
    grad_CV = p_CV.mul_(coefficient_CV)
    if grad_C is not None:
        grad_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] += grad_C
    return grad_CV
