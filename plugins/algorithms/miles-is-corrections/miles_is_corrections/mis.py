"""MIS: weights at one level, rejection at another, a veto and normalisation, each of which may be left out.

In this order, `rho = exp(l)` at a level (miles_is_corrections/ratios.py):

    weight      truncate: min(rho, high)    clip: clip(rho, low, high)    mask: rho, tokens outside [low, high] dropped
    rejection   tokens (or samples) outside [reject_low, reject_high] of their level are dropped
    veto        a sample with a token of rho_t < veto is dropped
    normalise   weights are divided by their mean over the batch, before rejection and veto

Liu, Li et al. 2025, When Speed Kills Stability: https://richardli.xyz/rl-collapse. Dropped tokens keep their place in
the denominators of the loss. `_T` tokens, `_N` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from miles.api import Correction, Metrics
from miles.toolkit import LOG_RATIO_BOUND, sum_per_sample
from miles_is_corrections.effect import corrected
from miles_is_corrections.plugin import Level, MisOptions
from miles_is_corrections.ratios import LogRatios


def mis(
    train_T: Tensor, rollout_T: Tensor, mask_T: Tensor, bounds: Sequence[int], *, options: MisOptions
) -> Correction:
    """Weights, a keep mask, or both."""
    ratios = LogRatios.of(train_T, rollout_T, mask_T, bounds)
    weights_T, dropped, metrics = None, [], mismatch(ratios)
    if options.level != "none":
        weights_T = bounded(ratios.at(options.level), options)
        if options.mode == "mask":
            dropped.append(outside(ratios.at(options.level), *options.bounds))
        if options.normalizes:
            factor = mean_weight(ratios, weights_T, ~dropped[0] if dropped else ratios.trained_T, options.level)
            weights_T, metrics["is/normalizer"] = weights_T / factor, factor
    if options.reject_level != "none":
        dropped.append(outside(ratios.at(options.reject_level), *options.reject_bounds))
        metrics["is/fraction_out_of_bounds"] = ratios.mean(dropped[-1])
    if options.veto is not None:
        vetoed_T, told = veto(ratios, options.veto)
        dropped.append(vetoed_T)
        metrics |= told
    keep_T = ~torch.stack(dropped).any(dim=0) if dropped else None
    level, low, high = reported(options)
    ratio_T = ratios.at(level)
    return corrected(ratios, ratio_T, ratio_T < low, ratio_T > high, weights_T, keep_T, metrics)


def bounded(ratio_T: Tensor, options: MisOptions) -> Tensor:
    """The weight of each token before normalisation, `[T]`."""
    low, high = options.bounds
    if options.mode == "mask":
        return ratio_T
    return ratio_T.clamp(0.0 if options.mode == "truncate" else low, high)


def outside(ratio_T: Tensor, low: float, high: float) -> Tensor:
    """Bool `[T]`; the bounds themselves are inside."""
    return (ratio_T < low) | (ratio_T > high)


def mean_weight(ratios: LogRatios, weights_T: Tensor, keep_T: Tensor, level: str) -> float:
    """Over the trainable tokens of the batch, or over its samples for a weight of samples; tokens that the mode `mask`
    drops are left out. 1 where that would be 0."""
    counted_T = (ratios.trained_T & keep_T).double()
    if level == "sequence":
        counted_T = counted_T / ratios.over_samples(sum_per_sample(counted_T, ratios.bounds)).clamp(min=1)
    total = float(counted_T.sum())
    mean = float((counted_T * weights_T).sum()) / total if total else 0.0
    return mean if mean > 1e-8 else 1.0


def reported(options: MisOptions) -> tuple[Level, float, float]:
    """Level and bounds that the metrics common to all corrections speak of: the weight's, or else the rejection's."""
    if options.level == "none":
        return "token" if options.reject_level == "none" else options.reject_level, *options.reject_bounds
    low, high = options.bounds
    return options.level, 0.0 if options.mode == "truncate" else low, high


def veto(ratios: LogRatios, threshold: float) -> tuple[Tensor, Metrics]:
    """Bool `[T]`: all tokens of the samples with a token whose ratio is below the threshold; and their shares."""
    catastrophe_T = ratios.l_T < math.log(threshold)  # 0 on tokens without a loss
    vetoed_N = sum_per_sample(catastrophe_T.double(), ratios.bounds) > 0
    told = {"is/veto_tokens": ratios.mean(catastrophe_T), "is/veto_samples": ratios.sample_mean(vetoed_N)}
    return ratios.over_samples(vetoed_N.double()) > 0, told


def mismatch(ratios: LogRatios) -> Metrics:
    """How far the two policies are apart, by the means of samples that its authors report."""
    sequence_N, mean_N = ratios.per_sample("sequence"), ratios.per_sample("geometric")
    bounded_T = ratios.l_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    difference = -ratios.sample_mean(mean_N)
    return {
        "is/k3_kl": ratios.mean(bounded_T.exp() - 1 - bounded_T),
        "is/chi2_token": ratios.mean((2 * bounded_T).exp()) - 1,
        "is/chi2_sequence": ratios.sample_mean((2 * sequence_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).exp()) - 1,
        "is/log_ppl_diff": difference,
        "is/log_ppl_abs_diff": ratios.sample_mean(mean_N.abs()),
        "is/ppl_ratio": math.exp(max(-LOG_RATIO_BOUND, min(LOG_RATIO_BOUND, difference))),
    }
