"""Save and load bit for bit; what cannot be loaded says why. On several ranks: tests/seams/test_fsdp2.py."""

from contextlib import contextmanager

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem

from miles.errors import CheckpointError, TrainError
from miles.types import LossResult


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_loaded_backend_goes_on_bit_for_bit(
    kind, dtype, request, make_backend, samples, pack, weighted, tmp_path, step, tensors, same
):
    config = request.getfixturevalue(kind)()
    options = {"train": {"dtype": dtype}, "optimizer": {"lr_schedule": "cosine", "weight_decay": 0.1}}
    first = make_backend(config, **options)
    for _ in range(2):
        step(first, pack(samples), weighted)
    first.save(tmp_path / "state")
    report = step(first, pack(samples), weighted)
    second = make_backend(config, **options)
    assert not same(tensors(first), tensors(second))
    second.load(tmp_path / "state")
    assert step(second, pack(samples), weighted) == report
    assert same(tensors(first), tensors(second))


def test_a_critics_value_head_is_saved(make_backend, samples, pack, tmp_path):
    first, second = make_backend(role="critic"), make_backend(role="critic")
    loss = lambda batch, outputs: LossResult((outputs.values_T - 3).square().sum())  # noqa: E731
    first.forward_backward([pack(samples)], loss, frozenset({"values"}))
    first.optim_step()
    first.save(tmp_path)
    assert not torch.equal(first.scorer.value_head.weight, second.scorer.value_head.weight)
    second.load(tmp_path)
    assert torch.equal(first.scorer.value_head.weight, second.scorer.value_head.weight)


def test_the_layout_is_the_same_with_masters_and_without(make_backend, tmp_path):
    """Names, dtypes and shapes; so a run in fp32 goes on from one in bf16."""
    layouts = []
    for dtype in ("fp32", "bf16"):
        make_backend(train={"dtype": dtype}).save(tmp_path / dtype)
        saved = FileSystemReader(tmp_path / dtype).read_metadata().state_dict_metadata
        layouts.append({name: (entry.properties.dtype, entry.size) for name, entry in saved.items()})
    assert layouts[0] == layouts[1]
    assert {name.split("/")[0] for name in layouts[0]} == {"parameter", "exp_avg", "exp_avg_sq", "step", "steps"}
    assert layouts[0].pop("steps") == (torch.int64, torch.Size([]))
    assert {dtype for dtype, _ in layouts[0].values()} == {torch.float32}


def test_bf16_takes_the_masters_of_fp32(make_backend, samples, pack, weighted, tmp_path, step, tensors, same):
    wide, narrow = make_backend(), make_backend(train={"dtype": "bf16"})
    step(wide, pack(samples), weighted)
    wide.save(tmp_path)
    narrow.load(tmp_path)
    assert same(tensors(wide), tensors(narrow))
    first = next(iter(narrow.optimizer.masters))
    assert torch.equal(narrow.optimizer.parameters[first], wide.optimizer.masters[first].bfloat16())


class Frozen:
    """A transform that trains the head of attention's output alone."""

    def prepare(self, model, role):
        return model

    def trainable(self, name):
        return "o_proj" in name

    def synced(self, groups):
        return groups


def test_what_is_frozen_may_come_from_another_dtype(make_backend, tmp_path):
    """A sharded model keeps what it does not train in float32, a whole one in bf16."""
    wide, narrow = (make_backend(train={"dtype": dtype}, transforms=(Frozen(),)) for dtype in ("fp32", "bf16"))
    with torch.no_grad():
        wide.scorer.lm.model.norm.weight.fill_(1.001)
    wide.save(tmp_path)
    narrow.load(tmp_path)
    assert narrow.scorer.lm.model.norm.weight.tolist() == [float(torch.tensor(1.001).bfloat16())] * 32
    assert torch.equal(narrow.scorer.lm.model.embed_tokens.weight, wide.scorer.lm.model.embed_tokens.weight.bfloat16())


def test_weights_alone_leave_the_optimizer(make_backend, samples, pack, weighted, tmp_path, step, tensors):
    first, second = make_backend(), make_backend()
    step(first, pack(samples), weighted)
    first.save(tmp_path)
    second.load(tmp_path, weights_only=True)
    assert second.optimizer.steps == 0
    found, expected = tensors(second), tensors(first)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name] if name.startswith("parameter/") else torch.zeros_like(tensor))


def test_what_cannot_be_loaded_says_why(make_backend, dense, tmp_path):
    backend = make_backend()
    with pytest.raises(CheckpointError, match=r"no state of backend `fsdp`.*--load"):
        backend.load(tmp_path)
    backend.save(tmp_path)
    with pytest.raises(CheckpointError, match="44 names differ"):
        make_backend(dense(num_hidden_layers=1)).load(tmp_path)
    with pytest.raises(CheckpointError, match=r"is torch.float32 \(32, 48\), here torch.float32 \(32, 40\)"):
        make_backend(dense(intermediate_size=40)).load(tmp_path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damaged_files_say_so(file, make_backend, tmp_path):
    backend = make_backend()
    backend.save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged; choose an earlier checkpoint"):
        backend.load(tmp_path)


def test_what_cannot_be_written_says_why(make_backend, tmp_path):
    (tmp_path / "__0_0.distcp").mkdir()
    with pytest.raises(CheckpointError, match="could not be written .*IsADirectoryError"):
        make_backend().save(tmp_path)


def test_a_full_disk_is_called_that(make_backend, tmp_path, monkeypatch):
    class Full:
        """A file on a full disk."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.file.tell() > 5000:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    opened = FileSystem.create_stream

    @contextmanager
    def full(self, path, mode):
        with opened(self, path, mode) as file:
            yield Full(file)

    monkeypatch.setattr(FileSystem, "create_stream", full)
    with pytest.raises(CheckpointError, match="could not be written .*No space left"):
        make_backend().save(tmp_path)


def test_a_state_that_is_away_is_not_saved(make_backend, tmp_path):
    backend = make_backend()
    backend.offload(frozenset({"optimizer"}))
    with pytest.raises(TrainError, match="offloaded"):
        backend.save(tmp_path)
