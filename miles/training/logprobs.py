"""From hidden states to the log-probabilities of given tokens, without ever holding all logits.

A vocabulary of 150,000 makes the fp32 logits of 8,192 tokens 5 GB, and the backward pass would want them several
times. So the head runs on `chunk_size` tokens at a time, keeps two numbers a token (three with entropy), and in the
backward pass computes the logits of each chunk again. Peak memory is `[chunk_size, V]`, the cost one more product
with the head.

What is done to the logits can be compiled: then they are read once (for an entropy twice) to give these numbers, and
once to become their gradient, and nothing wider than they are is ever held.

`T` tokens, `C` of them in a chunk, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`log softmax(head(hidden) / temperature)` at one target a row, and the entropy of each row's distribution.

    Both carry a gradient to the hidden states and to the head, tied or not. A plain `nn.Linear` takes a fused path; any
    other head (an adapter, a quantised layer) is called as a module and checkpointed chunk by chunk. Under FSDP2 this
    must run inside the forward of the module that owns the head, where its weight is gathered.

    Returns:
        `[T]` log-probabilities and `[T]` entropies (None unless asked for), float32 or wider.
    """
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        options = (temperature, chunk_size, entropy, compiled)
        fused = _LinearScores.apply(hidden_TH, head.weight, head.bias, targets_T, *options)
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
    return _selected(_log_softmax(logits_TV, temperature), targets_T, entropy)


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


def _numbers(logits_CV: Tensor, targets_C: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """`[C]` each: log-probabilities, the normalisers `log sum exp`, and entropies if asked for."""
    log_p_CV = _log_softmax(logits_CV, temperature)
    selected_C, entropy_C = _selected(log_p_CV, targets_C, entropy)
    normaliser_C = _at(logits_CV, targets_C).to(log_p_CV.dtype) / temperature - selected_C
    return (selected_C, normaliser_C) if entropy_C is None else (selected_C, normaliser_C, entropy_C)


def _selected(log_p_CV: Tensor, targets_C: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    return _at(log_p_CV, targets_C), -(log_p_CV.exp() * log_p_CV).sum(-1) if entropy else None


def _at(values_CV: Tensor, targets_C: Tensor) -> Tensor:
    return values_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1)


def _gradient(
    logits_CV: Tensor, normaliser_C: Tensor, grad_C: Tensor, entropies: tuple[Tensor, Tensor] | None, temperature: float
) -> Tensor:
    """Gradient of the logits, but for the targets' own: `-p (g + e (log p + H)) / temperature`; `entropies` is
    `(e, H)`."""
    z_CV = logits_CV.to(normaliser_C.dtype)
    log_p_CV = (z_CV if temperature == 1.0 else z_CV / temperature) - normaliser_C.unsqueeze(-1)
    del z_CV
    of_rows = None if entropies is None else (entropies[0].unsqueeze(-1) / -temperature, entropies[1].unsqueeze(-1))
    factor_CV = _coefficient(log_p_CV, grad_C.unsqueeze(-1) / -temperature, of_rows)
    return log_p_CV.exp().mul_(factor_CV).to(logits_CV.dtype)


def _coefficient(log_p: Tensor, grad: Tensor, entropies: tuple[Tensor, Tensor] | None) -> Tensor:
    """`g + e (log p + H)`."""
    if entropies is None:
        return grad
    grad_entropy, entropy = entropies
    return grad + grad_entropy * (log_p + entropy)


def _run(function: Callable[..., Any], compiled: bool, logits_CV: Tensor, *args: Any) -> Any:
    """`function(logits, *args)`; compiled for any number of rows of one width."""
    if not compiled:
        return function(logits_CV, *args)
    torch._dynamo.mark_static(logits_CV, 1)
    return _compiled(function)(logits_CV, *args)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


class _LinearScores(torch.autograd.Function):
    """Log-probabilities and entropies of a linear head, chunked in both directions.

    With `p = softmax(z)`, `z = (h W^T + b) / temperature`, `H` the entropy and `g`, `e` the incoming gradients:
    `dz = g onehot - p (g + e (log p + H))`. The gradient of the weight is summed over chunks in float32.
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
        compiled: bool,
    ) -> Any:
        chunks: list[tuple[Tensor, ...]] = [
            _run(_numbers, compiled, functional.linear(hidden_CH, weight_VH, bias_V), targets_C, temperature, entropy)
            for hidden_CH, targets_C in zip(hidden_TH.split(chunk_size), targets_T.split(chunk_size), strict=True)
        ]
        log_probs_T, normaliser_T, *entropies = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, log_probs_T, normaliser_T, *entropies)
        ctx.options = temperature, chunk_size, compiled
        ctx.set_materialize_grads(False)
        return (log_probs_T, *entropies) if entropies else log_probs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor | None, grad_entropy_T: Tensor | None = None) -> Any:
        hidden_TH, weight_VH, bias_V, targets_T, log_probs_T, normaliser_T, *entropies = ctx.saved_tensors
        temperature, chunk_size, compiled = ctx.options
        grad_T = torch.zeros_like(log_probs_T) if grad_T is None else grad_T
        of_entropy = None if grad_entropy_T is None else (grad_entropy_T, entropies[0])
        at_targets_T = grad_T - log_probs_T.exp() * _coefficient(log_probs_T, grad_T, of_entropy)
        at_targets_T = (at_targets_T / temperature).to(hidden_TH.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight_VH = grad_bias_V = None
        for start in range(0, len(hidden_TH), chunk_size):
            rows = slice(start, start + chunk_size)
            logits_CV = functional.linear(hidden_TH[rows], weight_VH, bias_V)
            chunk = None if of_entropy is None else (of_entropy[0][rows], of_entropy[1][rows])
            grad_CV = _run(_gradient, compiled, logits_CV, normaliser_T[rows], grad_T[rows], chunk, temperature)
            del logits_CV
            grad_CV.scatter_(1, targets_T[rows, None], at_targets_T[rows, None])
            if grad_hidden_TH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_hidden_TH[rows])
            if need_weight:
                grad_weight_VH = _added(grad_weight_VH, grad_CV.t() @ hidden_TH[rows], wide)
            if need_bias:
                grad_bias_V = _added(grad_bias_V, grad_CV.sum(0), wide)
        grad_weight_VH = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, grad_bias_V, None, None, None, None, None


def _added(total: Tensor | None, part: Tensor, wide: torch.dtype) -> Tensor:
    """In `wide` as soon as there are two parts."""
    return part if total is None else total.to(wide).add_(part)
