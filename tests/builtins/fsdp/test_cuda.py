"""What only a GPU can show: its kernels, memory that is really freed, memory that really runs out."""

import numpy as np
import pytest
import torch

from miles.training.packing import build_micro_batch, split_micro_batch
from miles.types import LossResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LOG_PROBS = frozenset({"log_probs"})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "flex", "flash"])
def test_kernels_agree_with_the_cpu(attention, dtype, dense, make_backend, samples, pack, weighted, gradients):
    if attention == "flash":
        pytest.importorskip("flash_attn")
        if dtype == "fp32":
            pytest.skip("flash-attn has no fp32 kernel")
    config = dense(head_dim=16)
    cpu = make_backend(config)
    gpu = make_backend(config, train={"dtype": dtype, "attention": attention}, device="cuda")
    expected, found = (b.forward([pack(samples)], LOG_PROBS)[0].log_probs_T for b in (cpu, gpu))
    torch.testing.assert_close(found, expected, atol=2e-5 if dtype == "fp32" else 0.1, rtol=0)
    norms = []
    for backend in (cpu, gpu):
        backend.forward_backward([pack(samples)], weighted)
        norms.append(backend.optim_step().grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_shared_prompt_is_computed_once_and_changes_nothing(attention, dense, make_backend, gradients):
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 37, (150,), generator=draw)
    samples = [torch.cat([prompt, torch.randint(0, 37, (n,), generator=draw)]).numpy() for n in (20, 33, 7)]
    masks = [np.r_[np.zeros(150), np.ones(len(s) - 150)].astype(np.float32) for s in samples]
    batch = build_micro_batch([0, 1, 2], samples, {"mask": masks}, device="cuda")
    assert batch.shared == [0, 150, 150]
    backend = make_backend(
        dense(head_dim=16, max_position_embeddings=512), train={"attention": attention}, device="cuda"
    )

    def loss(batch, outputs):
        return LossResult(-(outputs.log_probs_T * batch.columns["mask"]).sum(), {})

    found = []
    for shares in (True, False):
        backend.shares_prompts = shares
        backend.zero_grad()
        backend.forward_backward([batch], loss)
        found.append((backend.forward([batch], LOG_PROBS)[0].log_probs_T, gradients(backend)))
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-3)


def test_offloading_frees_the_device(dense, make_backend, samples, pack, weighted):
    backend = make_backend(dense(hidden_size=256, intermediate_size=1024), train={"dtype": "bf16"}, device="cuda")
    backend.forward_backward([pack(samples)], weighted)
    backend.optim_step()
    backend.zero_grad()
    before = torch.cuda.memory_allocated()
    held = sum(t.numel() * t.element_size() for t in backend._state().values())
    backend.offload(frozenset({"parameters", "gradients", "optimizer"}))
    assert before - torch.cuda.memory_allocated() > 0.9 * held
    backend.onload(frozenset({"parameters", "gradients", "optimizer"}))
    backend.forward_backward([pack(samples)], weighted)
    assert not backend.optim_step().skipped


def test_halves_fit_where_the_whole_does_not(dense, make_backend, weighted):
    """With memory capped between what half and all of a batch need, the retry with halves succeeds."""
    backend = make_backend(dense(hidden_size=256, num_hidden_layers=4, max_position_embeddings=2048), device="cuda")
    tokens = [torch.randint(0, 37, (2048,)).numpy() for _ in range(8)]
    weights = [torch.full((2048,), 1e-3).numpy() for _ in tokens]
    whole = build_micro_batch(range(8), tokens, {"weights": weights}, device="cuda")
    peaks = []
    for batches in (list(split_micro_batch(whole)), [whole]):
        backend.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        backend.forward_backward(batches, weighted)
        peaks.append(torch.cuda.max_memory_reserved())
    backend.zero_grad()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            backend.forward_backward([whole], weighted)
        backend.zero_grad()
        torch.cuda.empty_cache()
        backend.forward_backward(list(split_micro_batch(whole)), weighted)
        assert not backend.optim_step().skipped
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
