"""Running out of memory: one exception, and a retry that ends where an uninterrupted run does, bit for bit."""

import gc
import weakref

import pytest
import torch

from miles.builtins.fsdp.memory import one_out_of_memory_error
from miles.training.packing import split_micro_batch

CPU_MESSAGE = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(CPU_MESSAGE),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_every_memory_failure_is_one_exception(error):
    with pytest.raises(torch.OutOfMemoryError), one_out_of_memory_error():
        raise error


def test_a_real_allocation_of_the_cpu_fails_as_one():
    with pytest.raises(torch.OutOfMemoryError), one_out_of_memory_error():
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape") as caught, one_out_of_memory_error():
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_what_did_not_fit_is_free_while_the_exception_lives():
    class Activation:
        pass

    seen = []

    def deep():
        activation = Activation()
        seen.append(weakref.ref(activation))
        raise RuntimeError(CPU_MESSAGE)

    with pytest.raises(torch.OutOfMemoryError) as caught, one_out_of_memory_error():
        deep()
    gc.collect()
    assert caught.value is not None
    assert seen[0]() is None


# ------------------------------------------------------------------------------------------------------------- retries


def step(backend, batches, loss):
    backend.zero_grad()
    backend.forward_backward(batches, loss)
    return backend.optim_step()


def tensors(backend):
    return {name: tensor.clone() for name, tensor in backend._state().items()}


def fail_in_forward(backend, patch):
    """The second layer, on the second micro-batch, when the first has left its gradients."""
    layer = backend.scorer.lm.model.layers[1].mlp
    calls = []

    def forward(x, original=layer.forward):
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError(CPU_MESSAGE)
        return original(x)

    patch.setattr(layer, "forward", forward)


def fail_in_backward(backend, patch):
    """The gradient of the first layer, when later layers have theirs already."""
    calls = []

    def spoil(grad):
        calls.append(grad)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    layer = backend.scorer.lm.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: output.register_hook(spoil) and None)
    patch.setattr(layer, "_handle_for_the_test", handle, raising=False)


def fail_in_optimizer(backend, patch):
    calls = []

    def failing(*args, original=backend.optimizer.adamw.step):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return original(*args)

    patch.setattr(backend.optimizer.adamw, "step", failing)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fail", [fail_in_forward, fail_in_backward, fail_in_optimizer])
def test_a_retry_ends_where_an_uninterrupted_run_does(fail, dtype, make_backend, samples, pack, weighted, monkeypatch):
    batches = list(split_micro_batch(pack(samples)))
    calm, hit = (make_backend(train={"dtype": dtype}) for _ in range(2))
    for backend in (calm, hit):
        step(backend, batches, weighted)
    step(calm, batches, weighted)
    fail(hit, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        step(hit, batches, weighted)
    monkeypatch.undo()
    step(hit, batches, weighted)
    expected = tensors(calm)
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors(hit).items())


def test_a_retry_with_halves_ends_close(make_backend, samples, pack, weighted, monkeypatch):
    calm, hit = make_backend(), make_backend()
    whole = pack(samples)
    step(calm, [whole], weighted)
    fail_in_optimizer(hit, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        step(hit, [whole], weighted)
    step(hit, list(split_micro_batch(whole)), weighted)
    for name, master in hit.optimizer.masters.items():
        torch.testing.assert_close(
            hit.optimizer.adamw.state[master]["exp_avg"],
            calm.optimizer.adamw.state[calm.optimizer.masters[name]]["exp_avg"],
            atol=1e-6,
            rtol=1e-5,
        )


def test_forward_without_gradient_can_be_retried(make_backend, samples, pack, monkeypatch):
    backend = make_backend()
    want = frozenset({"log_probs"})
    fail_in_forward(backend, monkeypatch)
    backend.forward([pack(samples)], want)
    with pytest.raises(torch.OutOfMemoryError):
        backend.forward([pack(samples)], want)
    (outputs,) = backend.forward([pack(samples)], want)
    assert outputs.log_probs_T is not None
    assert outputs.log_probs_T.isfinite().all()
