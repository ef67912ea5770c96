"""The real wandb, offline: what is on disk afterwards."""

import struct
import time

import pytest
from miles_wandb.plugin import WandbOptions

from miles.api import ConfigError, RunInfo

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _nobodys_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def tracker_of(**options):
    from miles_wandb.tracker import WandbTracker

    return WandbTracker(WandbOptions(**{"mode": "offline", **options}))


def track(directory, steps, resumed_from=None, status="completed", **options):
    tracker = tracker_of(**options)
    tracker.start(RunInfo("my run", directory, {"train": {"lr": 1e-4}}, resumed_from))
    run_id = tracker._run.id
    for step in steps:
        tracker.log(step, {"rollout/reward": step / 4})
    tracker.finish(status)
    return run_id


def records_of(directory):
    """All records of an offline run. wandb's own process writes them, a moment after `finish` has returned."""
    [path] = directory.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = list(parsed(path.read_bytes()))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.05)
    raise TimeoutError(f"{path} has no exit record")


def parsed(data):
    """LevelDB's log format, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, whole = 7, b""
    while position + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history_of(directory):
    rows = []
    for record in records_of(directory):
        if record.HasField("history"):
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            rows.append((int(items["_step"]), float(items["rollout/reward"])))
    return rows


def test_an_offline_run_is_on_disk(tmp_path):
    run_id = track(tmp_path, range(3), project="sums", group="g", team="us", tags=("a",))
    assert history_of(tmp_path) == [(0, 0.0), (1, 0.25), (2, 0.5)]
    [run] = [record.run for record in records_of(tmp_path) if record.HasField("run")][:1]
    assert (run.project, run.entity, run.run_group, run.display_name) == ("sums", "us", "g", "my run")
    assert (run.run_id, list(run.tags)) == (run_id, ["a"])
    assert '{"lr":' in next(u.value_json for u in run.config.update if "train" in (u.key, *u.nested_key)).replace(
        " ", ""
    )
    exits = [record.exit.exit_code for record in records_of(tmp_path) if record.HasField("exit")]
    assert exits == [0]


def test_a_resumed_run_is_the_same_wandb_run_and_a_new_one_is_not(tmp_path):
    first = track(tmp_path, [0, 1], status="interrupted")
    assert track(tmp_path, [1, 2], resumed_from=1) == first
    assert track(tmp_path, [0]) != first
    assert track(tmp_path, [], resumed_from=0, run_id="given") == "given"


def test_when_wandb_cannot_start_the_error_says_what_to_do(tmp_path, monkeypatch):
    def refuse(**_):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match="no route to host.*--wandb-mode offline"):
        tracker_of(mode="online").start(RunInfo("x", tmp_path, {}))
