"""Ranks of the tests of what ranks say to each other: alone, two, and four.

    python communication_rank.py FOLDER WORK

Each writes what it found in its `WORK` to `facts-RANK-of-SIZE.json`.
"""

import json
import sys
from pathlib import Path

import keeping_step_rank
import torch.distributed as dist
import ulysses_rank
from forked_ranks import fork, join, wait

WORKS = {"ulysses": (ulysses_rank.run, (1, 2, 4)), "keeping_step": (keeping_step_rank.run, (2, 4))}
"""What ranks do, and how many of them."""


def one_rank(work: str, rank: int, size: int, folder: Path) -> None:
    if size > 1:
        join(rank, size, folder / f"meeting-{size}")
    facts = WORKS[work][0](rank, size, folder)
    if size > 1:
        dist.barrier()
    (folder / f"facts-{rank}-of-{size}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    folder, work = Path(sys.argv[1]), sys.argv[2]
    wait([fork(one_rank, work, rank, size, folder) for size in WORKS[work][1] for rank in range(size)])
