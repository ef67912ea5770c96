"""Checkpoint folders, against what transformers and safetensors write and read."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from miles.api import CheckpointError, ConfigError
from miles.checkpoint_io import read_weights, resolve_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    folder = tmp_path_factory.mktemp("source")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def merged(groups):
    return {name: tensor for group in groups for name, tensor in group.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_reads_one_tensor_at_a_time(source):
    groups = list(read_weights(source))
    assert all(len(group) == 1 for group in groups)
    assert same(merged(groups), load_file(source / "model.safetensors"))


def test_a_written_checkpoint_is_one_that_transformers_loads(source, tmp_path):
    weights = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    write_checkpoint(tmp_path / "out", [weights], source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(model.state_dict()), weights)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "some are for their owner alone"


def test_shards_and_index(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    write_checkpoint(tmp_path / "out", ({n: t} for n, t in weights.items()), source, shard_bytes=4000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights.values())
    assert same(merged(read_weights(tmp_path / "out")), weights)
    assert same(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()), weights)


def test_the_config_says_the_dtype_that_was_written(source, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    write_checkpoint(tmp_path / "out", [weights], source)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_groups_may_reuse_their_memory(source, tmp_path):
    """A group is only valid until the next one."""
    buffer = torch.zeros(4)

    def groups():
        for value in range(3):
            yield {str(value): buffer.fill_(value)[:2]}

    write_checkpoint(tmp_path / "out", groups(), source)
    assert [merged(read_weights(tmp_path / "out"))[str(v)].tolist() for v in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_an_older_export_is_replaced_whole(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    write_checkpoint(tmp_path / "out", ({n: t} for n, t in weights.items()), source, shard_bytes=4000)
    write_checkpoint(tmp_path / "out", [weights], source)
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]


def test_ranks_that_do_not_write_walk_along(source, tmp_path):
    walked = []
    write_checkpoint(tmp_path / "out", (walked.append(i) or {} for i in range(3)), source, write=False)
    assert walked == [0, 1, 2]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_what_was_there(source, tmp_path, monkeypatch):
    weights = load_file(source / "model.safetensors")
    write_checkpoint(tmp_path / "out", [weights], source)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"out could not be written: .*No space left"):
        write_checkpoint(tmp_path / "out", [{name: tensor + 1 for name, tensor in weights.items()}], source)
    assert same(merged(read_weights(tmp_path / "out")), weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_source_of_weights_leaves_nothing(source, tmp_path):
    def groups():
        yield {"a": torch.zeros(2)}
        raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError, match="rank 1 died"):
        write_checkpoint(tmp_path / "out", groups(), source)
    assert not list(tmp_path.iterdir())


def test_nothing_to_write_is_an_error(source, tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        write_checkpoint(tmp_path / "out", [], source)


def test_a_damaged_file_is_named(source, tmp_path):
    data = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*damaged or cut off"):
        list(read_weights(tmp_path))


def test_a_missing_shard_or_tensor_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks two\.safetensors"):
        list(read_weights(tmp_path))
    index["weight_map"]["b"] = "one.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"one\.safetensors lacks 'b'"):
        list(read_weights(tmp_path))


def test_pickled_weights_are_not_read(tmp_path):
    with pytest.raises(CheckpointError, match="nothing is there"):
        list(read_weights(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        list(read_weights(tmp_path))


def test_folders_are_found_as_they_are(source, tmp_path):
    assert resolve_checkpoint(str(source)) == source
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="no checkpoint folder at"):
        resolve_checkpoint(str(tmp_path / "nowhere"))


def test_other_names_are_hub_names(tmp_path, monkeypatch):
    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        if name == "somebody/absent":
            raise OSError("404: repository not found.")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_checkpoint("Qwen/Qwen3-0.6B", "main") == tmp_path
    assert asked["name"] == "Qwen/Qwen3-0.6B"
    assert asked["revision"] == "main"
    assert "*.safetensors" in asked["patterns"]
    with pytest.raises(
        ConfigError, match=r"'somebody/absent' is neither a folder .* 404: [\w ]+\. Give .*--online.*HF_TOKEN"
    ):
        resolve_checkpoint("somebody/absent")
