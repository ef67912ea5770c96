"""Tensors of the machine's memory are shared as files: the server is no child of the process whose weights it opens."""

import torch

torch.multiprocessing.set_sharing_strategy("file_system")
