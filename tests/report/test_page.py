"""What a report is made of, and what becomes of a run directory that is not as it should be."""

import fcntl
import gzip
import io
import json
import logging
import re
import shutil
from base64 import b64decode

import numpy as np
import pytest
import yaml

from miles.cli import main
from miles.errors import ConfigError
from miles.report import page as page_module
from miles.report.blocks import BlockWriter
from miles.report.page import HERE, SCRIPTS, leave_report, offers, write_report
from miles.report.runs import differences, labels, read_run
from miles.report.samples import Selection, _quota, choose
from miles.report.vocabulary import find_folder, token_texts


def block(path, name):
    text = path.read_text()
    return gzip.decompress(b64decode(re.search(rf'id="block-{name}">([^<]*)<', text)[1]))


def test_columns_of_numbers_come_back_as_they_were():
    out = io.BytesIO()
    values = np.array([0.0, -1.2345, np.nan, 7e9, -3.0])
    BlockWriter(out).columns("x", {"a": (values, 1e-3), "b": (np.arange(5.0), 1.0)})
    raw = gzip.decompress(b64decode(re.search(rb">([^<]+)<", out.getvalue())[1]))
    length = int.from_bytes(raw[:4], "little")
    assert json.loads(raw[4 : 4 + length]) == {"names": ["a", "b"], "scales": [1e-3, 1.0], "count": 5}
    planes = np.frombuffer(raw[4 + length :], np.uint8).reshape(2, 4, 5)
    a, b = (np.ascontiguousarray(p.T).view("<i4")[:, 0].tolist() for p in planes)
    assert a == [0, -1234, -(2**31), 2**31 - 1, -3000]  # to the even one; none; as far as it goes
    assert b == [0, 1, 2, 3, 4]


def test_every_file_of_the_page_is_used_and_none_ends_its_script():
    assert {path.name for path in HERE.glob("*.js")} == set(SCRIPTS)
    for name in SCRIPTS:
        source = (HERE / name).read_text()
        assert "</script" not in source
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", source), name


def test_tokens_by_their_texts(run, tokenizer_folder, tmp_path):
    assert write_report([run], tmp_path / "out.html") == []
    (vocabulary,) = json.loads(block(tmp_path / "out.html", "vocabulary"))
    assert dict(zip(vocabulary["ids"], vocabulary["texts"], strict=True))[3] == "<b>bold</b>"
    index = json.loads(block(tmp_path / "out.html", "index"))
    assert index["count"] == 1200
    assert index["sets"] == ["words", "sums"]


def test_part_of_a_character_is_shown_as_its_bytes():
    class Tokenizer:
        pieces = ["Ġhi", "âĤ", "▁so", None, "Ã¤"]
        texts = [" hi", "\N{REPLACEMENT CHARACTER}", "so", "", "ä"]

        def __len__(self):
            return 5

        def convert_ids_to_tokens(self, i):
            return self.pieces[i]

        def decode(self, ids, **_):
            return self.texts[ids[0]]

    assert token_texts(Tokenizer(), [0, 1, 2, 3, 4, 9]) == [" hi", "\\xe2\\x82", " so", "<3>", "ä", "<9>"]


def test_without_a_tokenizer_there_is_a_note(tmp_path, write_run):
    run = write_run(tmp_path / "run", 20, 6)
    (note,) = write_report([run], tmp_path / "out.html")
    assert "tokens are shown as numbers" in note
    assert "somewhere/model is neither a folder here nor in the cache" in note


def test_a_checkpoint_is_found_from_where_the_run_was_started(tmp_path, write_run):
    run = write_run(tmp_path / "there" / "runs" / "one", 1, 6)
    (tmp_path / "there" / "somewhere" / "model").mkdir(parents=True)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["run"]["dir"] = "runs/one"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert find_folder(read_run(run)) == tmp_path / "there" / "somewhere" / "model"


def test_a_line_that_was_cut_off_is_a_note(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')
    record = read_run(run)
    assert [row["step"] for row in record.rows] == [0, 1, 2, 3]
    assert record.notes == ["line 5 of metrics.jsonl is no whole JSON object and is left out (the file ends within it)"]


def test_what_is_wrong_with_a_sample_is_a_note(run, tmp_path):
    path = run / "rollouts" / "step_000001.jsonl"
    path.write_text('{"id": 1, "tokens": [1, 2], "reward": NaN}\n[]\n{"id": 2, "tok')
    notes = write_report([run], tmp_path / "out.html")
    assert notes == [f"line {n} of step_000001.jsonl is no sample and is left out" for n in (2, 3)]
    assert json.loads(block(tmp_path / "out.html", "index"))["values"]["reward"][0] is None


def test_status_of_a_run_that_never_ended(run):
    (run / "summary.json").write_text('{"status": "interrupted", "steps": 1}')  # of its earlier life
    assert read_run(run).status == "unfinished"
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read_run(run).status == "running"
    (run / "summary.json").write_text('{"status": "interrupted", "steps": 3}')
    assert read_run(run).status == "interrupted"


def test_what_is_missing_is_said_with_what_cannot_be_shown(run, tmp_path, capsys):
    assert read_run(run).notes == []
    for name in ("summary.json", "metrics.jsonl", "plugins.json"):
        (run / name).unlink()
    shutil.rmtree(run / "rollouts")
    notes = read_run(run).notes
    beginnings = [
        "summary.json (the run was killed",
        "metrics.jsonl (no step",
        "rollouts/step_NNNNNN.jsonl (",
        "plugins",
    ]
    for note, beginning, lost in zip(notes, beginnings, ["versions", "curves", "samples", "plugins"], strict=True):
        assert note.startswith(f"there is no {beginning}")
        assert re.search(rf"\): .*{lost}.* are not shown$", note)
    out = tmp_path / "out.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().err.splitlines() == [f"note: {note}" for note in notes]
    assert json.loads(block(out, "overview"))["runs"][0]["notes"] == notes


def test_what_was_not_asked_for_or_is_still_to_come_is_not_missing(run):
    shutil.rmtree(run / "rollouts")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, "rollout": {"dump_samples": 0}}))
    (run / "summary.json").unlink()
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read_run(run).notes == []


def test_steps_without_samples_are_said(run, tmp_path, write_run, capsys):
    other = write_run(tmp_path / "other", 20, 6)
    (run / "rollouts" / "step_000002.jsonl").unlink()
    out = str(tmp_path / "out.html")
    assert main(["report", str(run), str(other), "--out", out, "--steps", "2"]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "note: first: there are samples of 2 steps out of 1 to 3 and none of step 2 (--steps)",
        "note: other: there are samples of step 1 and none of step 2 (--steps)",
    ]
    assert choose(read_run(run), Selection(samples=0), runs=1).why_none == "700 are left out"


def test_kinds_of_components_read_as_words():
    kinds = {"policy_losses": ["a", "b"], "rewards": ["c"], "is_corrections": ["d"], "of_tomorrow": ["e"]}
    assert offers(kinds) == ["policy losses: a, b", "reward: c", "IS correction: d", "of tomorrow: e"]


def test_settings_that_differ():
    one = {"run": {"dir": "a"}, "optimizer": {"lr": 0.1, "betas": [1, 2]}}
    two = {"run": {"dir": "b"}, "optimizer": {"lr": 0.2, "betas": [1, 2]}, "eval": {"sets": []}}
    assert differences([one, two]) == [
        {"key": "optimizer.lr", "values": ["0.1", "0.2"]},
        {"key": "eval.sets", "values": [None, "[]"]},
    ]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, write_run):
    runs = [read_run(write_run(tmp_path / parent / "grpo", 1, 6)) for parent in ("seed-1", "seed-2")]
    assert labels(runs) == ["seed-1/grpo", "seed-2/grpo"]
    assert labels(runs[:1]) == ["grpo"]


@pytest.mark.parametrize(
    ("counts", "room", "quota"), [([5, 5, 5], 15, 5), ([5, 5, 5], 14, 4), ([1, 9, 9], 11, 5), ([], 3, 0), ([4], 0, 0)]
)
def test_room_is_shared_evenly(counts, room, quota):
    assert _quota(counts, room) == quota


def test_what_does_not_fit_is_left_out_evenly_and_said(run, tmp_path):
    record = read_run(run)
    sizes = choose(record, Selection(samples=300), runs=1)
    assert [(step, count) for step, _, count in sizes.taken] == [(1, 100), (2, 100), (3, 100)]
    assert (sizes.samples, sizes.left_out) == (1200, 900)
    light = choose(record, Selection(max_bytes=sum(path.stat().st_size for _, path in record.dumps) // 2), runs=1)
    assert 550 <= light.samples - light.left_out <= 600
    assert [step for step, *_ in choose(record, Selection(steps=(2, 2)), runs=1).taken] == [2]
    assert [step for step, *_ in choose(record, Selection(samples=40), runs=1).taken] == [1, 3]
    assert choose(record, Selection(samples=0), runs=1).taken == []


def test_the_command(run, capsys, tmp_path):
    assert main(["report", str(run)]) == 0
    assert re.match(rf"report: {run}/report.html \(\d+\.\d MB\)\n", capsys.readouterr().out)
    assert (
        main(["report", str(run), str(run), "--out", str(tmp_path / "two.html"), "--steps", "2", "--samples", "7"]) == 0
    )
    assert json.loads(block(tmp_path / "two.html", "index"))["numbers"]["step"] == [2] * 6  # three of each run
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a run directory"),
        (["nowhere"], "nowhere: there is no such directory"),
        (["."], r"\. is no run directory: it has no config.yaml; it holds run directories, though: first"),
        (["first", "--steps", "x"], "--steps x: FIRST:LAST is expected"),
        (["first", "--steps", "9:3"], "--steps 9:3: the first step comes after the last; 3:9 is the other way round"),
        (["first", "--out", "some/new/x.html"], r"there is no folder some/new; make it first \(mkdir -p some/new\)"),
        (["first", "--samples", "-3"], "--samples -3: a whole number"),
        (["first", "--outt", "x"], "not --outt"),
        (["first", "--out", "."], r"--out \. is a directory"),
        (["first", "--out", "first/config.yaml/x.html"], "the report cannot be written to"),
    ],
)
def test_what_cannot_be_done_is_said(run, monkeypatch, capsys, words, message):
    monkeypatch.chdir(run.parent)
    assert main(["report", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (run.parent / "some").exists()


def test_at_the_end_of_a_run_a_report_that_fails_is_a_warning(run, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "miles")
    leave_report(run)
    assert caplog.messages == [f"report: {run}/report.html"]
    monkeypatch.setattr(page_module, "plotly_block", lambda: (_ for _ in ()).throw(ConfigError("no plotly")))
    leave_report(run)
    assert caplog.messages[1].startswith("there is no report: ConfigError: no plotly; try `miles report")
    assert (run / "report.html").exists()  # the earlier one, whole
