"""The kernel of decoding against attention written out, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

pytest.importorskip("triton")

from miles.builtins.torch_engine import decode_kernel

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]


def written_out(q_BND, k_BNMD, v_BNMD, positions, window):
    group = q_BND.shape[1] // k_BNMD.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k_BNMD, v_BNMD))
    rows = []
    for i, position in enumerate(positions):
        seen = slice(max(position + 1 - window, 0) if window else 0, position + 1)
        scores_NM = torch.einsum("nd,nmd->nm", q_BND[i].double(), k[i, :, seen]) * q_BND.shape[2] ** -0.5
        rows.append(torch.einsum("nm,nmd->nd", scores_NM.softmax(-1), v[i, :, seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("kv_heads", "group", "width"), [(2, 1, 64), (2, 2, 128), (1, 8, 32)])
def test_kernel_agrees(kv_heads, group, width, dtype, tolerance, window):
    generator = torch.Generator().manual_seed(0)
    positions = [0, 1, 63, 64, 300, 511, 512, 700]
    cache = torch.randn(2, 9, kv_heads, 768, width, generator=generator).to(DEVICE, dtype)
    cache[:, :, :, 701:] = torch.nan  # what lies behind the end is never looked at
    q = torch.randn(len(positions), kv_heads * group, width, generator=generator).to(DEVICE, dtype)
    k, v = cache[:, : len(positions), :, :704]
    found = decode_kernel.attend(q, k, v, torch.tensor(positions, device=DEVICE), window)
    torch.testing.assert_close(found.double(), written_out(q, k, v, positions, window), atol=tolerance, rtol=tolerance)


def test_company_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 4, 2, 1536, 64, generator=generator).to(DEVICE)
    q = torch.randn(4, 4, 64, generator=generator).to(DEVICE)
    positions = torch.tensor([900, 3, 600, 1500], device=DEVICE)
    k, v = cache
    together = decode_kernel.attend(q, k, v, positions, None)
    alone = decode_kernel.attend(q[:1], k[:1, :, :1000], v[:1, :, :1000], positions[:1], None)
    assert torch.equal(together[:1], alone)
