"""A batch from log-ratios, and a correction called on it."""

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session")
def corrected():
    """`corrected(function, options, [[l, ...], ...])`: the correction of samples with these log-ratios.

    A list is a sample; None is a token without a loss. `w` and `keep` of the result are lists of the samples' shape.
    """

    def call(function, options, samples, pad=0):
        bounds = [0, *accumulate(map(len, samples))]
        flat = [value for sample in samples for value in sample]
        mask_T = torch.tensor([float(value is not None) for value in flat] + [0.0] * pad)
        l_T = torch.tensor([3.0 if value is None else value for value in flat] + [3.0] * pad)
        train_T = torch.full_like(l_T, -1.0)
        found = function(train_T, train_T - l_T, mask_T, bounds, options=options)

        def per_sample(values_T):
            values = values_T if values_T is None else values_T.tolist()
            return values if values is None else [values[start:end] for start, end in pairwise(bounds)]

        return SimpleNamespace(w=per_sample(found.weights_T), keep=per_sample(found.keep_T), metrics=found.metrics)

    return call
