"""Arguments as the real one writes them, a few of them."""

from typing import Annotated as A


class ServerArgs:
    model_path: A[str, "Where the weights are."]
    mem_fraction_static: A[float | None, "A share of the memory."] = None
    disable_cuda_graph: A[bool, "No graphs."] = False
    tp_size: A[int, "Ranks."] = 1

    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--enable-torch-compile", action="store_true")
