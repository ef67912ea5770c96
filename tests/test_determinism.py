"""What a job changes about its process."""

import torch

from miles.config.run import RunSection
from miles.determinism import prepared_process


def settings():
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def test_the_caller_has_its_threads_and_kernels_again():
    before = settings()
    with prepared_process(RunSection(deterministic=True, num_threads=before[0] + 1)):
        assert settings() == (before[0] + 1, True)
    assert settings() == before
