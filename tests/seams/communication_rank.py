"""One rank of the tests of what ranks say to each other: alone, as one of two, as one of four.

    python communication_rank.py RANK FOLDER

Writes `facts-RANK-of-SIZE.json`.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import keeping_step_rank
import torch
import torch.distributed as dist
import ulysses_rank

PATIENCE = timedelta(seconds=200)
"""Two of the ranks wait for the others, which are first among themselves."""


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for size in (1, 2, 4):
        if rank >= size:
            continue
        if size > 1:
            place = f"file://{folder}/rendezvous-{size}"
            dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=PATIENCE)
        facts = {"ulysses": ulysses_rank.run(rank, size, folder)}
        if size > 1:
            facts["keeping_step"] = keeping_step_rank.run(rank, size)
            dist.barrier()
        (folder / f"facts-{rank}-of-{size}.json").write_text(json.dumps(facts))
        if size == 2:
            dist.destroy_process_group()
    dist.barrier()
    os._exit(0)  # threads of gloo now and then abort a process that ends otherwise, when all is written


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
