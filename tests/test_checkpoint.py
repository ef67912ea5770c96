"""All of a checkpoint or nothing; the newest good one is found."""

import asyncio
import json

import pytest

from miles.checkpoint import CheckpointStore, damage, find_checkpoint
from miles.errors import CheckpointError


def save(store, step, text="weights"):
    async def write(folder):
        (folder / "actor").mkdir()
        (folder / "actor" / "model.bin").write_text(f"{text} {step}")
        (folder / "state.json").write_text(json.dumps({"step": step}))

    return asyncio.run(store.save(step, write))


def test_saved_and_found(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    for step in (1, 2, 3):
        save(store, step)
    assert store.newest().step == 3
    assert [path.name for path in store.newest_names()] == ["step_000003", "step_000002"]
    assert find_checkpoint(tmp_path).step == find_checkpoint(tmp_path / "checkpoints" / "step_000003").step == 3


@pytest.mark.parametrize("harm", ["truncate", "change", "remove", "no manifest", "bad manifest", "other manifest"])
def test_the_one_before_a_damaged_one_is_used_with_a_warning(tmp_path, caplog, harm):
    store = CheckpointStore(tmp_path, keep=None)
    save(store, 1)
    newest = save(store, 2)
    model = newest / "actor" / "model.bin"
    match harm:
        case "truncate":
            model.write_text("we")
        case "change":
            model.write_text("weighty 2"[: len(model.read_text())].ljust(len(model.read_text()), "!"))
        case "remove":
            model.unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "bad manifest":
            (newest / "manifest.json").write_text('{"files"')
        case "other manifest":
            (newest / "manifest.json").write_text('{"files": {"a": {"bytes": 3}}}')
    assert store.newest().step == 1
    assert "step_000002 is damaged" in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path, keep=None)
    (save(store, 1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints.*--resume never"):
        store.newest()


def test_a_failed_write_leaves_the_last_good_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)

    async def full(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*step_000001"):
        asyncio.run(store.save(2, full))
    assert store.newest().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_crash_in_the_middle_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    (tmp_path / ".step_000002.partial").mkdir()
    (tmp_path / ".step_000002.partial" / "state.json").write_text("{}")
    assert store.newest().step == 1
    assert damage(save(store, 2)) is None


def test_nothing_there_is_an_error_for_whoever_names_it(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(tmp_path)


def test_a_change_shows_in_whichever_piece_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("miles.checkpoint.PIECE", 8)
    text = "0123456789abcdefghijklmnop"
    folder = save(CheckpointStore(tmp_path, keep=None), 1, text)
    model = folder / "actor" / "model.bin"
    whole = model.read_bytes()
    assert damage(folder) is None
    for place in range(len(whole)):
        model.write_bytes(whole[:place] + b"!" + whole[place + 1 :])
        assert damage(folder) == "actor/model.bin has changed"
    model.write_bytes(whole)
    assert damage(folder) is None
