"""Weights by way of files: what lies there, who is given what, and what is done about an engine that fell behind."""

import asyncio
import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from miles.builtins import disk_sync
from miles.builtins.delta import apply, bytes_of, checksum, codec
from miles.builtins.disk_sync import DiskSync
from miles.builtins.inprocess import InProcessExecutor
from miles.builtins.options import DiskOptions
from miles.config import Spec
from miles.durable import put_in_place
from miles.errors import WeightSyncError
from miles.protocols import ExecutorContext, Seats, SyncContext
from miles.testing import installed, tiny
from miles.testing.syncs import PROMPT
from miles.training.checksums import checksums, compare_checksums

pytest.importorskip("miles_llama")


class Holder:
    """A train worker whose weights a test changes; it shares the test's process."""

    def __init__(self, rank, size, weights):
        self.weights = weights

    def send_weights(self, target, *args):
        from miles.targets import import_target

        return import_target(target)(self.stream(), *args)

    def stream(self):
        for name, tensor in self.weights.items():
            if name == self.weights.get("breaks"):
                raise ArithmeticError("deliberate")
            yield {name: tensor}


def stage(work, tmp_path, dtype="fp32", tied=False, engines=1, **options):
    """`work(sync, weights, engines)` with a tiny model's weights, a dict that may be changed between pushes."""
    config = tiny.hf_config("llama", tie_word_embeddings=tied)
    folder = tiny.checkpoint(tmp_path / "model", config, 0)
    lower = torch.bfloat16 if dtype == "bf16" else torch.float32
    weights = {name: tensor.to(lower) for name, tensor in load_file(folder / "model.safetensors").items()}

    async def main():
        executor = InProcessExecutor(context=ExecutorContext({"train": Seats(1)}))
        workers = await executor.launch("train", f"{__name__}:Holder", weights)
        context = replace(tiny.engine_context(installed(), config, folder, load_weights=False), dtype=dtype)
        built = [installed().build("rollout_engines", Spec(name="torch"), context=context) for _ in range(engines)]
        for engine in built:
            await engine.start()
        sync = DiskSync(DiskOptions(**options), context=SyncContext(folder, tmp_path / "run", buffer_size=4096))
        await sync.connect(workers, built)
        try:
            await work(sync, weights, workers, built)
        finally:
            for engine in built:
                await engine.close()

    asyncio.run(main())


def changed(tensor, share=0.1):
    """Some numbers a little larger."""
    mask = torch.rand(tensor.shape) < share
    return torch.where(mask, tensor * 1.02, tensor)


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "run" / "weights").iterdir())


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize(("dtype", "tied"), [("fp32", True), ("bf16", False), ("bf16", True)])
def test_changes_bring_every_engine_to_the_same_bits(tmp_path, dtype, tied, encoding):
    async def work(sync, weights, workers, engines):
        first = await sync.push(0)
        assert first == {"weight_sync/bytes": sum(t.nbytes for t in weights.values()), "weight_sync/density": 1.0}
        for version in (1, 2, 5):
            before = dict(weights)
            weights.update({name: changed(tensor) for name, tensor in weights.items() if "norm" not in name})
            metrics = await sync.push(version)
            differ = sum(int((bytes_of(t) != bytes_of(before[name])).sum()) for name, t in weights.items())
            assert metrics["weight_sync/density"] == differ / first["weight_sync/bytes"]
            for engine in engines:
                assert await engine.checksums() == checksums({name: t} for name, t in weights.items())
                assert (await engine.health()).weight_version == version

    stage(work, tmp_path, dtype, tied, engines=2, mode="delta", encoding=encoding, compression="zlib")


@pytest.mark.parametrize("compression", ["auto", "zlib", "none"])
def test_others_can_read_what_changed(tmp_path, compression):
    """From the index and the files alone."""

    async def work(sync, weights, workers, engines):
        await sync.push(3)
        old = {name: bytes_of(tensor).copy() for name, tensor in weights.items()}
        names = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
        weights.update({name: changed(weights[name]) for name in names})
        metrics = await sync.push(4)
        folder = tmp_path / "run" / "weights" / "weight_v000004"
        text = (folder / "model.safetensors.index.json").read_text()
        index, form = json.loads(text), json.loads(text)["metadata"]
        assert (form["version"], form["base_version"], form["delta_encoding"]) == ("000004", "000003", "xor")
        assert sorted(index["weight_map"]) == sorted(names)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "some are for their owner alone"
        assert metrics["weight_sync/bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        for name, file in index["weight_map"].items():
            difference = codec(form["compression_format"]).decompress(load_file(folder / file)[name].numpy().tobytes())
            new = apply(old[name], difference, "xor")
            assert new.tobytes() == bytes_of(weights[name]).tobytes()
            from safetensors import safe_open

            said = safe_open(folder / file, "pt").metadata()[name]
            assert said == checksum(new, form["checksum_format"])

    stage(work, tmp_path, mode="delta", compression=compression)


def test_nothing_changed_is_next_to_nothing_sent(tmp_path):
    async def work(sync, weights, workers, engines):
        await sync.push(0)
        metrics = await sync.push(1)
        assert metrics["weight_sync/density"] == 0
        assert metrics["weight_sync/bytes"] < 500
        assert (await engines[0].health()).weight_version == 1

    stage(work, tmp_path, mode="delta")


def test_full_checkpoints_are_checkpoints_and_two_are_kept(tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "run" / "weights" / "weight_v000090").mkdir(parents=True)

    async def work(sync, weights, workers, engines):
        for version in (1, 2, 3, 7):
            await sync.push(version)
        assert folders(tmp_path) == ["weight_v000003", "weight_v000007"], "one of an earlier life is still there"
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "weights" / "weight_v000007")
        assert await engines[0].score(PROMPT) == pytest.approx(tiny.log_probs_of(lm, PROMPT).numpy(), abs=2e-4)

    stage(work, tmp_path)


def test_an_engine_that_fell_behind_makes_the_push_a_full_one(tmp_path):
    async def work(sync, weights, workers, engines):
        await sync.push(1)
        engines[1].scheduler.version = -1  # as one that started again by itself
        assert (await sync.push(2))["weight_sync/density"] == 1.0
        assert (await sync.push(3))["weight_sync/density"] == 0.0

    stage(work, tmp_path, engines=2, mode="delta")


def test_changes_for_other_bytes_are_refused_and_the_next_push_is_full(tmp_path):
    async def work(sync, weights, workers, engines):
        await sync.push(1)
        name = "model.layers.1.self_attn.q_proj.weight"
        engines[0].scheduler.decoder.weights["layers.1.qkv.weight"][0, 0] += 1
        weights[name] = changed(weights[name])
        with pytest.raises(WeightSyncError, match=f"{name}.*were made for other bytes.*of version 1, in the trainer's"):
            await sync.push(2)
        assert (await engines[0].health()).weight_version == 1
        assert (await sync.push(3))["weight_sync/density"] == 1.0
        await compare_checksums(workers, engines, 3)

    stage(work, tmp_path, mode="delta")


@pytest.mark.parametrize("compression", ["zlib", "none", "auto"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:-100], "the changes in .*weight_v000002 cannot be read"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 255]) + data[-8:], "the changes of 'lm_head.weight' in .*weight_v"),
    ],
)
def test_a_damaged_file_is_a_sync_that_failed_and_can_be_done_again(tmp_path, monkeypatch, compression, spoil, told):
    def damaged(partial, final):
        (path,) = partial.glob("*.safetensors")
        path.write_bytes(spoil(path.read_bytes()))
        put_in_place(partial, final)

    async def work(sync, weights, workers, engines):
        await sync.push(1)
        monkeypatch.setattr(disk_sync, "put_in_place", damaged)
        weights["lm_head.weight"] = changed(weights["lm_head.weight"])
        with pytest.raises(WeightSyncError, match=f"version 2 did not arrive: {told}"):
            await sync.push(2)
        assert (await sync.push(3))["weight_sync/density"] == 1.0
        await compare_checksums(workers, engines, 3)

    stage(work, tmp_path, mode="delta", compression=compression)


def test_changes_that_cannot_be_written_are_a_sync_that_failed(tmp_path, monkeypatch):
    def full(*words, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def work(sync, weights, workers, engines):
        await sync.push(1)
        monkeypatch.setattr(disk_sync, "write_safetensors", full)
        weights["lm_head.weight"] = changed(weights["lm_head.weight"])
        with pytest.raises(WeightSyncError, match="arrive: .*weight_v000002 could not be written: .*No space left"):
            await sync.push(2)

    stage(work, tmp_path, mode="delta")


def test_a_sender_that_fails_halfway_leaves_no_folder_and_no_wrong_base(tmp_path):
    async def work(sync, weights, workers, engines):
        await sync.push(1)
        whole = dict(weights)
        weights.update({name: changed(tensor) for name, tensor in weights.items()})
        last = list(weights)[-1]
        weights["breaks"] = last
        with pytest.raises(WeightSyncError, match="version 2 did not arrive: .*deliberate"):
            await sync.push(2)
        assert folders(tmp_path) == ["weight_v000001"]
        assert [p.name for p in (tmp_path / "run" / "weights").iterdir()] == ["weight_v000001"]
        assert (await engines[0].health()).weight_version == 1
        weights.clear()
        weights.update(whole)
        assert (await sync.push(3))["weight_sync/density"] == 1.0

    stage(work, tmp_path, mode="delta")


def test_checksums_name_the_tensors_that_differ(tmp_path):
    async def work(sync, weights, workers, engines):
        await sync.push(1)
        await compare_checksums(workers, engines, 1)
        await compare_checksums(workers, [object()], 1)  # one that offers none is not asked
        engines[1].scheduler.decoder.weights["layers.1.gate_up.weight"][0, 0] += 1e-3
        with pytest.raises(
            WeightSyncError, match=r"version 1, engine 1 holds.*in 1 of 21 tensors: model.layers.1.mlp.gate_proj.weight"
        ):
            await compare_checksums(workers, engines, 1)

    stage(work, tmp_path, engines=2)
