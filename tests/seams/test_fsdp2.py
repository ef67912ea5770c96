"""FSDP2 behind the train-backend protocol: two gloo ranks do what one process does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CASES = ("dense", "moe", "bf16", "critic")
SECONDS = 120
"""After which the ranks are taken to hang."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one process and two ranks wrote."""
    folder = tmp_path_factory.mktemp("fsdp2")
    script = Path(__file__).with_name("fsdp2_rank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(folder), *CASES],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, size in ((0, 1), (0, 2), (1, 2))
    ]
    deadline = time.monotonic() + SECONDS
    said = []
    try:
        for rank in ranks:
            said.append(rank.communicate(timeout=max(deadline - time.monotonic(), 1))[0])
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(said)
    return folder


def facts(folder: Path, rank: int, size: int) -> dict:
    return json.loads((folder / f"facts-{rank}-of-{size}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_three_steps_end_at_the_same_weights(folder, case):
    one, two = (load_file(folder / f"{case}-{size}.safetensors") for size in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradient_norms_and_scores_agree(folder, case):
    one, first, second = (facts(folder, rank, size)[case] for rank, size in ((0, 1), (0, 2), (1, 2)))
    assert first["norms"] == second["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert first["scores"] + second["scores"] == pytest.approx(one["scores"], rel=1e-5)
    assert first["aux"] + second["aux"] == pytest.approx(one["aux"], rel=1e-4)


@pytest.mark.parametrize(
    "fact",
    [
        "restored",  # load brings back what save wrote
        "moved_on",  # (and there was something to bring back)
        "resumed",  # a step after save and load, offload and onload is the step without them, bit for bit
        "skipped",  # a loss that is not a number on one rank skips the step on both
        "retried",  # an out-of-memory in the middle of a step, and the step again, is the step without it
        "empty",  # one rank may have an empty micro-batch
    ],
)
def test_sharded_state(folder, fact):
    for rank in (0, 1):
        assert {case: found[fact] for case, found in facts(folder, rank, 2).items()} == dict.fromkeys(CASES, True)


def test_router_balance_is_counted_once(folder):
    assert facts(folder, 0, 1)["moe"]["aux"] > 0
