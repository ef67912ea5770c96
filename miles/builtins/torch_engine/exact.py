"""Arithmetic for a CPU in which a token's numbers have the same bits whatever is computed beside it: alone or among
others, in a prefill or when decoding, with a cached prefix or without.

Kernels round by the shape of what they get: BLAS has other ones for few rows, sums are cut by how many terms there are,
and the end of an array that fills no whole vector is computed by itself. So all shapes here are whole blocks, and keys
are gone through block by block. It holds for Intel's MKL, which torch's usual builds for x86 have, with one thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16
KEYS = 32
_LOWEST = -1e30
"""Instead of -inf, which less itself is no number."""


def whole_rows(x_TH: Tensor) -> Tensor:
    """With rows of zeros below, up to whole blocks of `ROWS`."""
    missing = -len(x_TH) % ROWS
    return F.pad(x_TH, (0, 0, 0, missing)) if missing else x_TH


def attend(q_BQND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, positions_BQ: Tensor, window: int | None) -> Tensor:
    """Causal attention, `[B, Q, N * D]`: queries at these positions see keys at `position` and before, the last
    `window` of them if there is one.

    Softmax with running maxima and sums over blocks of keys (Milakov and Gimelshein, 2018), in float32 or wider: a
    block that a query does not see changes nothing of it. Dimensions: `_B` sequences, `_Q` queries, `_N` heads, `_K`
    heads of keys, `_M` keys, `_D` head; `_R` queries of all heads that share their keys.
    """
    count, queries, heads, width = q_BQND.shape
    wide = torch.promote_types(q_BQND.dtype, torch.float32)
    group = heads // k_BKMD.shape[1]
    rows = queries * group
    q_BKRD = q_BQND.view(count, queries, -1, group, width).transpose(1, 2).reshape(count, -1, rows, width)
    q_BKRD = F.pad(q_BKRD.to(wide) * width**-0.5, (0, 0, 0, -rows % ROWS))
    last_BR = F.pad(positions_BQ.repeat_interleave(group, 1), (0, -rows % ROWS))[:, None, :, None]
    most = torch.full_like(q_BKRD[..., :1], _LOWEST)
    total, out = torch.zeros_like(most), torch.zeros_like(q_BKRD)
    for start in range(0, k_BKMD.shape[2], KEYS):
        k, v = (_block(tensor, start).to(wide) for tensor in (k_BKMD, v_BKMD))
        key_M = torch.arange(start, start + KEYS)
        hidden = key_M > last_BR
        if window is not None:
            hidden |= key_M <= last_BR - window
        scores = (q_BKRD @ k.transpose(2, 3)).masked_fill_(hidden, -torch.inf)
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        shares = scores.sub_(most).exp_()
        kept = (before - most).expand(-1, -1, -1, 2).contiguous().exp_()[..., :1]  # two of each: whole vectors
        total = total * kept + shares.sum(-1, keepdim=True)
        out = out * kept + shares @ v
    out_BKQGD = (out / total)[:, :, :rows].view(count, -1, queries, group, width)
    return out_BKQGD.transpose(1, 2).reshape(count, queries, heads * width).to(q_BQND.dtype)


def _block(tensor_BKMD: Tensor, start: int) -> Tensor:
    block = tensor_BKMD[:, :, start : start + KEYS]
    return F.pad(block, (0, 0, 0, KEYS - block.shape[2])) if block.shape[2] < KEYS else block
