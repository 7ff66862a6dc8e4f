"""One micro-batch -> (loss, sums with counts, maxima): the weighted surrogate and the penalties,
each over its global denominator.

L = sum_t w_t f_t l_t / D over the whole batch of all replicas, with w_t the token's weight (times
its correction), T_i the trained tokens of its sequence, S the sequences that have any:

    aggregation           f_t      D
    weighted-token-mean   1        sum_t w_t      ResT's code, over the global batch
    token-mean            1        sum_i T_i      DAPO (arXiv 2503.14476)
    sequence-mean         1 / T_i  S              GRPO (arXiv 2402.03300), ResT's paper
    fixed                 1        S L            Dr. GRPO (arXiv 2503.20783), L = fixed_length

D and f_t are known before the first forward, so the gradient does not depend on how the batch was
cut into micro-batches or replicas. D is of the uncorrected weights: a masked token counts as a 0.

Penalties p_t (KL to a reference, entropy, KL-Cov) are no credit: they bind the policy on every
trained token alike. So they are added as sum_t f_t p_t / D_1, with D_1 the same aggregation's D at
weights of one (weighted-token-mean: sum_i T_i), and neither weights nor corrections touch them.
Under weights of one this is the usual sum_t f_t (l_t + p_t) / D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from rest_mega.config import LossConfig
from rest_mega.losses.kl import kl
from rest_mega.losses.policy import SURROGATES, Sequences, log_ratio
from rest_mega.records import Bools, Floats, Ints

Report = dict[str, torch.Tensor]

POLICY_SUMS = ("surrogate", "clip_fraction", "ratio", "approx_kl", "entropy")
"""Names in the sums of `policy_objective`; each is a tensor [total, count] over trained rows."""
REFERENCE_SUMS = ("reference_kl",)
"""Names in the sums of `penalty_objective` where there is a reference: k3, which is never negative,
whichever the loss takes."""


@dataclass(frozen=True)
class Totals:
    """What a batch holds, over all replicas."""

    weights: float
    """Sum of the weights of trained tokens."""
    tokens: float
    """Trained tokens."""
    sequences: float
    """Sequences with a trained token."""


AGGREGATIONS: dict[str, Callable[[Totals, LossConfig], float]] = {
    "weighted-token-mean": lambda totals, config: totals.weights,
    "token-mean": lambda totals, config: totals.tokens,
    "sequence-mean": lambda totals, config: totals.sequences,
    "fixed": lambda totals, config: totals.sequences * config.fixed_length,
}
"""Name -> D of the global batch."""


def denominators(totals: Totals, config: LossConfig) -> tuple[float, float]:
    """(D of the weighted surrogate, D_1 of the penalties) of a global batch that has a trained
    token; D is 1 where no token has a weight, and the surrogate 0."""
    of = AGGREGATIONS[config.aggregation]
    return of(totals, config) or 1.0, of(replace(totals, weights=totals.tokens), config)


def token_factors(
    weights_T: Floats, mask_T: Bools, sample_T: Ints, config: LossConfig
) -> tuple[Floats, Totals]:
    """(w_t f_t of the trained tokens and 0 elsewhere, what these packed whole sequences add to the
    totals)."""
    trained_T = np.where(mask_T, weights_T, 0.0).astype(np.float64)
    row_T = np.asarray(sample_T, dtype=np.int64) + 1
    tokens_S = np.bincount(row_T, weights=mask_T)
    totals = Totals(float(trained_T.sum()), float(tokens_S.sum()), float((tokens_S > 0).sum()))
    if config.aggregation == "sequence-mean":
        trained_T /= np.maximum(tokens_S, 1.0)[row_T]
    return trained_T.astype(np.float32), totals


def policy_objective(
    logprob_R: torch.Tensor,
    entropy_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    advantages_R: torch.Tensor,
    weights_R: torch.Tensor,
    sequences: Sequences,
    config: LossConfig,
    denominator: float,
) -> tuple[torch.Tensor, Report, Report]:
    """The weighted surrogate of one micro-batch over the global denominator; `weights_R` holds the
    products w_t f_t.

    Rows may be none: the loss is then a zero that backward can walk. Reported statistics are
    unweighted: approx_kl is mean(old - new) (k1).
    """
    loss_R, clipped_R = SURROGATES[config.policy](
        logprob_R, old_logprob_R, advantages_R, config, sequences
    )
    loss = (weights_R * loss_R).sum() / denominator
    with torch.no_grad():
        log_ratio_R = log_ratio(logprob_R, old_logprob_R)
        values = (loss_R, clipped_R, log_ratio_R.exp(), -log_ratio_R, entropy_R)
        sums = {name: _sum_count(value) for name, value in zip(POLICY_SUMS, values, strict=True)}
    return loss, sums, {}


def penalty_objective(
    logprob_R: torch.Tensor,
    entropy_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    reference_R: torch.Tensor | None,
    drift_R: torch.Tensor,
    shares_R: torch.Tensor,
    config: LossConfig,
    denominator: float,
) -> tuple[torch.Tensor, Report]:
    """(penalties, sums) of one micro-batch over the global denominator D_1:

    p_t = kl k_t(pi, reference) - entropy_bonus H_t + drift_t |log pi/pi_old|

    Args:
        reference_R: log-probs of the reference policy; None: there is none.
        drift_R: KL-Cov's coefficient of each row (credit.tokens=kl-cov), 0 for most.
        shares_R: f_t.
    """
    assert reference_R is not None or not config.kl, "loss.kl needs log-probs of the reference"
    penalty_R = drift_R * log_ratio(logprob_R, old_logprob_R).abs()
    if config.entropy_bonus:
        penalty_R = penalty_R - config.entropy_bonus * entropy_R
    if reference_R is None:
        return (shares_R * penalty_R).sum() / denominator, {}
    if config.kl:
        penalty_R = penalty_R + config.kl * kl(config.kl_estimator, logprob_R, reference_R)
    measured = _sum_count(kl("k3", logprob_R.detach(), reference_R))
    return (shares_R * penalty_R).sum() / denominator, {REFERENCE_SUMS[0]: measured}


def supervised_objective(
    logprob_R: torch.Tensor, weights_R: torch.Tensor, denominator: float
) -> tuple[torch.Tensor, Report, Report]:
    """Next-token cross-entropy of one micro-batch over the global sum of weights."""
    return -(weights_R * logprob_R).sum() / denominator, {}, {}


def _sum_count(values_R: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [values_R.double().sum(), values_R.new_tensor(values_R.numel(), dtype=torch.float64)]
    )
