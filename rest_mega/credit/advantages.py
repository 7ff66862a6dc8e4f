"""Rewards of the siblings of each prompt -> advantages, and what single tokens make of them.

Sources: GRPO (arXiv 2402.03300; unbiased std, + 1e-6), Dr. GRPO (arXiv 2503.20783; mean only), RLOO
(arXiv 2402.14740; the mean of the other siblings), REINFORCE++ (arXiv 2501.03262; standardised over
the global batch, or centred on the group's mean and divided by the std of what that leaves in the
global batch; biased std as in the authors' OpenRLHF, which counts a trajectory once per token
though, here it counts once).

The global batch of REINFORCE++ is the groups that are trained on, over all replicas: what
`credit.equal_groups` leaves out is not in it, so that the advantages of what remains have a std of
one however many groups were without signal.

A token rule gives a factor >= 0 on each token's advantage and a penalty >= 0 on how far the token's
log-prob drifts. The surrogates are positively homogeneous in the advantage, so the factor scales
the token's loss and leaves its clipping and the global denominator alone: a token of factor 0 still
counts in the mean, as in the sources. Sources:

- high-entropy: only the share of tokens with the highest entropy carries gradient ("Beyond the
  80/20 rule", arXiv 2506.01939);
- clip-cov: a few random tokens whose (log-prob - mean) x (advantage - mean) is high carry none
  (arXiv 2505.22617);
- kl-cov: the share of tokens for which that product is highest is penalised in the loss by a
  coefficient x |log pi - log pi_old| (the same paper, whose own code clips no ratio beside it);
- entropy-advantage: A + min(alpha H, |A| / kappa) (arXiv 2506.14758).

The rules look at the whole batch of a rollout, under the parameters that the scoring pass saw, also
where several optimizer steps are taken on it. Thresholds are exact over all ranks; they cost four
all-reduces of 256 counts and about 0.1 s per million tokens of a rank, and no entropy travels.
Layouts round entropies differently in the last bits, so tokens that close to a threshold may fall
on either side of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rest_mega.config import CreditConfig, one_of, require
from rest_mega.credit.ranking import Keys, kth_largest, ordered
from rest_mega.records import Bools, Floats, Reals, TokenCredit, Total, TrainedRows

Doubles = npt.NDArray[np.float64]
TokenRule = Callable[[TrainedRows, Total], TokenCredit]
"""(the rows of this rank, sum over all ranks) -> what each of them is due."""
_Rule = Callable[[CreditConfig, int, TrainedRows, Total], TokenCredit]


def advantages(rewards_PG: Reals, method: str, batch_PG: Reals | None = None) -> Floats:
    """advantages_PG of every sibling; 0 in groups without signal.

    `method`: grpo, dr_grpo or rloo, for which a group of one has no siblings to compare with: its
    mean counts as 0 and its std as 1; or reinforce++ or reinforce++-baseline, which look at
    `batch_PG`, the rewards of the global batch (None: these groups are all of it). The same batch
    in any order gives the same bits. Raises ConfigError on an unknown method, on rewards that are
    not finite, and for reinforce++-baseline in groups of one.
    """
    one_of("credit.advantage", method, (*METHODS, *BATCH_METHODS))
    rewards = _check(rewards_PG)
    if method in BATCH_METHODS:
        batch = rewards if batch_PG is None else _check(batch_PG)
        return BATCH_METHODS[method](rewards, batch).astype(np.float32)
    if rewards.shape[1] == 1:
        return rewards.astype(np.float32)
    result = METHODS[method](rewards - rewards.mean(axis=1, keepdims=True))
    # Equal rewards differ from their mean by rounding alone, which a small std would blow up.
    return np.where(has_signal(rewards_PG, method)[:, None], result, 0.0).astype(np.float32)


def has_signal(rewards_PG: Reals, method: str) -> Bools:
    """signal_P: the group's rewards are not all equal (in a group of one: the reward is not 0).

    Under reinforce++ a group of equal rewards still says how it compares with the others: all
    groups have signal unless the rewards of all of them are equal, `rewards_PG` being all of the
    step.
    """
    rewards = _check(rewards_PG)
    if method == "reinforce++":
        differ = rewards.size > 0 and rewards.max() > rewards.min()
        return np.full(len(rewards), differ)
    return np.asarray(
        rewards[:, 0] != 0 if rewards.shape[1] == 1 else rewards.max(axis=1) > rewards.min(axis=1)
    )


def _grpo(centred: Doubles) -> Doubles:
    return np.asarray(centred / (centred.std(axis=1, ddof=1, keepdims=True) + 1e-6))


def _dr_grpo(centred: Doubles) -> Doubles:
    return centred


def _rloo(centred: Doubles) -> Doubles:
    siblings = centred.shape[1]
    return np.asarray(centred * (siblings / (siblings - 1)))


Method = Callable[[Doubles], Doubles]
"""Rewards [P, G > 1], each group centred on its mean -> advantages [P, G]."""
METHODS: dict[str, Method] = {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}
"""Name -> method; `credit.advantage` chooses from it and BATCH_METHODS."""


def advantage(name: str) -> Callable[[Method], Method]:
    """Register the decorated function as `name`; ConfigError where the name is taken. Groups of
    equal rewards have advantage 0 whatever it gives."""

    def register(function: Method) -> Method:
        free = name not in METHODS and name not in BATCH_METHODS
        require(free, f"the advantage {name!r} is registered already; choose another name")
        METHODS[name] = function
        return function

    return register


def _reinforce(rewards: Doubles, batch: Doubles) -> Doubles:
    mean = _mean(batch)
    return _over_std(rewards - mean, batch - mean)


def _reinforce_baseline(rewards: Doubles, batch: Doubles) -> Doubles:
    require(
        rewards.shape[1] > 1,
        "credit.advantage=reinforce++-baseline takes a group's mean off and needs siblings: set "
        "rollout.samples_per_prompt to 2 or more, or credit.advantage=reinforce++",
    )
    return _over_std(_centred(rewards), _centred(batch))


BATCH_METHODS: Mapping[str, Callable[[Doubles, Doubles], Doubles]] = MappingProxyType(
    {"reinforce++": _reinforce, "reinforce++-baseline": _reinforce_baseline}
)
"""Name -> function of the rewards of some groups and of those of the global batch."""


def _centred(rewards: Doubles) -> Doubles:
    """Every group minus its mean; exact zeros where its rewards are equal."""
    means = np.array([_mean(group) for group in rewards]).reshape(-1, 1)
    equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    return np.where(equal, 0.0, rewards - means)


def _over_std(centred: Doubles, batch: Doubles) -> Doubles:
    """`centred` over the std of the centred batch; zeros where nothing in the batch differs."""
    if not batch.size or batch.max() == batch.min():
        return np.zeros_like(centred)
    return np.asarray(centred / (math.sqrt(_mean(batch**2)) + 1e-8))


def _mean(values: Doubles) -> float:
    """The mean, its sum rounded once: no order of the values changes a bit."""
    return math.fsum(values.ravel()) / max(values.size, 1)


def _check(rewards_PG: Reals) -> Doubles:
    rewards: Doubles = np.asarray(rewards_PG, dtype=np.float64)
    require(
        rewards.ndim == 2 and rewards.shape[1] > 0,
        f"rewards of shape {rewards.shape} must be [P, G] with G >= 1",
    )
    require(
        bool(np.isfinite(rewards).all()),
        "a reward is not finite; look at the reward functions in rewards.parts",
    )
    return rewards


# ------------------------------------------------------------------ tokens


def token_rule(config: CreditConfig, step: int) -> TokenRule:
    """The rule that `credit.tokens` names, for the step (which seeds what a rule draws)."""
    one_of("credit.tokens", config.tokens, TOKENS)
    return functools.partial(TOKENS[config.tokens], config, step)


def _factors(factor_R: npt.NDArray[Any]) -> TokenCredit:
    return TokenCredit(factor_R.astype(np.float32), np.zeros(len(factor_R), dtype=np.float32))


def _all(config: CreditConfig, step: int, rows: TrainedRows, total: Total) -> TokenCredit:
    return _factors(np.ones(len(rows.advantages_R)))


def _high_entropy(config: CreditConfig, step: int, rows: TrainedRows, total: Total) -> TokenCredit:
    """1 for the tokens of highest entropy (and all that equal the last of them), else 0."""
    weighted_R = rows.weights_R > 0
    count = float(total(np.array([weighted_R.sum()], dtype=np.float64))[0])
    keys_R = ordered(rows.entropy_R)
    least = kth_largest(keys_R[weighted_R], max(1, round(config.high_entropy_share * count)), total)
    return _factors(keys_R >= least)


def _clip_cov(config: CreditConfig, step: int, rows: TrainedRows, total: Total) -> TokenCredit:
    """0 for tokens drawn among those whose covariance lies in the range, else 1."""
    covariance_R, count = _covariance(rows, total)
    inside_R = (covariance_R >= config.clip_cov_low) & (covariance_R <= config.clip_cov_high)
    inside_R &= rows.weights_R > 0
    lots_R = lots(rows, step)
    least = kth_largest(lots_R[inside_R], max(1, round(config.clip_cov_share * count)), total)
    return _factors(~(inside_R & (lots_R >= least)))


def _kl_cov(config: CreditConfig, step: int, rows: TrainedRows, total: Total) -> TokenCredit:
    """The coefficient for the tokens of highest covariance (and all that equal the last of them),
    else 0; advantages stay."""
    covariance_R, count = _covariance(rows, total)
    keys_R, weighted_R = ordered(covariance_R.astype(np.float32)), rows.weights_R > 0
    least = kth_largest(keys_R[weighted_R], max(1, round(config.kl_cov_share * count)), total)
    drift_R = np.where(weighted_R & (keys_R >= least), config.kl_cov_coefficient, 0.0)
    return TokenCredit(np.ones(len(drift_R), dtype=np.float32), drift_R.astype(np.float32))


def _covariance(rows: TrainedRows, total: Total) -> tuple[Doubles, float]:
    """((log-prob - mean) x (advantage - mean) of every row, number of weighted tokens); means over
    the weighted tokens of all ranks."""
    weighted_R = rows.weights_R > 0
    columns = (np.ones(len(weighted_R)), rows.logprob_R, rows.advantages_R)
    sums = total(np.array([c[weighted_R].sum(dtype=np.float64) for c in columns]))
    count, means = sums[0], sums[1:] / max(sums[0], 1.0)
    covariance_R = (rows.logprob_R - means[0]) * (rows.advantages_R - means[1])
    return covariance_R, float(count)


def _entropy_advantage(
    config: CreditConfig, step: int, rows: TrainedRows, total: Total
) -> TokenCredit:
    """(A + min(alpha H, |A| / kappa)) / A; 1 where A is 0."""
    a_R = rows.advantages_R
    added_R = np.minimum(config.shaping_alpha * rows.entropy_R, np.abs(a_R) / config.shaping_kappa)
    ratio_R = np.divide(added_R, a_R, out=np.zeros_like(a_R), where=a_R != 0)
    return _factors(1.0 + ratio_R)


TOKENS: Mapping[str, _Rule] = MappingProxyType(
    {
        "all": _all,
        "high-entropy": _high_entropy,
        "clip-cov": _clip_cov,
        "kl-cov": _kl_cov,
        "entropy-advantage": _entropy_advantage,
    }
)
"""Name -> what becomes of the rows; composes with every preset of weights."""


def lots(rows: TrainedRows, step: int) -> Keys:
    """A uniform draw per token from the step and what the token is (id, position, rollout
    log-prob): the same at every layout and in every resumed run (SplitMix64's finalizer)."""
    bits_R = np.asarray(rows.rollout_R, dtype=np.float32).view(np.uint32)
    lots_R = np.full(len(bits_R), step, dtype=np.uint64)
    for column_R in (rows.ids_R, rows.positions_R, bits_R):
        lots_R = (lots_R ^ column_R.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        lots_R = (lots_R ^ (lots_R >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        lots_R = (lots_R ^ (lots_R >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        lots_R = lots_R ^ (lots_R >> np.uint64(31))
    return (lots_R >> np.uint64(32)).astype(np.uint32)
