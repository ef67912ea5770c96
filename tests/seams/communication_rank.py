"""Ranks of the tests of what ranks say to each other: alone, two, and four.

    python communication_rank.py FOLDER

Each writes `facts-RANK-of-SIZE.json`.
"""

import json
import sys
from pathlib import Path

import keeping_step_rank
import torch.distributed as dist
import ulysses_rank
from forked_ranks import fork, join, wait


def one_rank(rank: int, size: int, folder: Path) -> None:
    if size > 1:
        join(rank, size, folder / f"meeting-{size}")
    facts = {"ulysses": ulysses_rank.run(rank, size, folder)}
    if size > 1:
        facts["keeping_step"] = keeping_step_rank.run(rank, size)
        dist.barrier()
    (folder / f"facts-{rank}-of-{size}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    wait([fork(one_rank, rank, size, Path(sys.argv[1])) for size in (1, 2, 4) for rank in range(size)])
