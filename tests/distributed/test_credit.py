"""Credit of single tokens and training without a scoring pass: the same step at every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rest_mega.config import CreditConfig, LossConfig
from tests.support.bench import SGD, Bench, small_case
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

REGIONS = 4
WEIGHT_OF_REGION = np.array([0.5, 1.0, 0.0, 0.25], dtype=np.float32)
RULES = {
    "all": CreditConfig(),
    "high-entropy": CreditConfig(tokens="high-entropy", high_entropy_share=0.2),
    "clip-cov": CreditConfig(
        tokens="clip-cov", clip_cov_share=0.1, clip_cov_low=0.05, clip_cov_high=9.0
    ),
    "entropy-advantage": CreditConfig(tokens="entropy-advantage", shaping_alpha=0.1),
}
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
    "dp2": {},
}
NO_SCORING = LossConfig(scoring=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("small"))


class Step:
    """A fresh trainer's batch of two parts or one, scored and weighed by region."""

    def __init__(self, bench: Bench, parts: int = 1, loss: LossConfig = LossConfig()) -> None:  # noqa: B008
        self.bench, self.trainer = bench, bench.trainer(SGD, tokens=64, loss=loss)
        place = bench.place
        samples = random_samples()[place.data_rank :: place.data_size]
        self.parts = self.trainer.pack(samples, parts)
        self.scores = self.trainer.score(self.parts)
        self.weights = [[WEIGHT_OF_REGION[b.regions_T] for b in part] for part in self.parts]

    def take(self, parts: Any) -> dict[str, Any]:
        """What the first optimizer step measures and every rank's gradients, put together."""
        from rest_mega.sync.export import Exporter
        from rest_mega.sync.names import named_parameters

        trainer = self.trainer
        result = trainer.step(parts[0], self.scores[0], self.weights[0])
        for _, parameter in named_parameters(trainer.chunks):
            parameter.data.copy_(parameter.main_grad)
        exporter = Exporter(trainer.modules, self.bench.architecture, self.bench.place)
        return {
            "loss": result.loss,
            "norm": result.grad_norm,
            "metrics": dict(result.metrics),
            "pulls": trainer.rows.pull_sums(parts, self.weights, REGIONS),
            "sums": trainer.rows.region_sums(parts, self.scores, REGIONS),
            "gradients": {n: t.float().numpy() for n, t in exporter.stream()},
        }


def same(got: dict[str, Any], want: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert got["loss"] == pytest.approx(want["loss"], rel=tolerance)
    assert got["norm"] == pytest.approx(want["norm"], rel=tolerance)
    assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-4, abs=1e-6)
    for name in ("pulls", "sums"):
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, err_msg=name)
    for name, gradient in got["gradients"].items():  # on leads alone
        expected = want["gradients"][name]
        np.testing.assert_allclose(
            gradient, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=name
        )


def _by_rule(case: Any, sizes: dict[str, int]) -> dict[str, Any]:
    from rest_mega.credit.advantages import token_rule

    bench, answer = Bench(case, **sizes), {}
    for name, config in RULES.items():
        step = Step(bench)
        rule = token_rule(config, 5)
        scaled = step.trainer.rows.credit_tokens(step.parts, step.scores, step.weights, rule)
        answer[name] = step.take(scaled)
    return answer


@pytest.fixture(scope="module")
def on_one_rank(case: Any) -> dict[str, Any]:
    return dict(run_ranks(_by_rule, 1, case, {})[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_s_gradients_and_shares_are_those_of_one_rank(
    layout: str, case: Any, on_one_rank: dict[str, Any]
) -> None:
    for got in run_ranks(_by_rule, 2, case, LAYOUTS[layout]):
        for name, want in on_one_rank.items():
            same(got[name], want)


def _scores(case: Any) -> Any:
    step = Step(Bench(case, tensor=2))
    return [(s.logprob_R.tolist(), s.entropy_R.tolist()) for s in step.scores[0]]


def test_tensor_ranks_score_alike_to_the_bit_and_so_decide_alike(case: Any) -> None:
    first, second = run_ranks(_scores, 2, case)
    assert first == second


def _by_hand(case: Any) -> Any:
    """A step on the advantages that sorting the scores of all tokens gives."""
    step = Step(Bench(case))
    scored = list(zip(step.parts[0], step.scores[0], step.weights[0], strict=True))
    every = np.concatenate([s.entropy_R[w[b.mask_T] > 0] for b, s, w in scored])
    least = np.sort(every)[::-1][round(0.2 * len(every)) - 1]
    batches = []
    for b, s, _ in scored:
        advantages_T = b.advantages_T.copy()
        advantages_T[np.flatnonzero(b.mask_T)[s.entropy_R < least]] = 0
        batches.append(replace(b, advantages_T=advantages_T))
    return step.take([batches]), len(every)


def test_high_entropy_is_the_step_on_a_fifth_of_the_advantages(
    case: Any, on_one_rank: dict[str, Any]
) -> None:
    want, weighted = run_ranks(_by_hand, 1, case)[0]
    same(on_one_rank["high-entropy"], want)
    assert want["pulls"][1].sum() == round(0.2 * weighted)


def test_the_pull_of_a_region_is_the_sum_of_its_weights_times_advantages(
    on_one_rank: dict[str, Any],
) -> None:
    pulls_K, count_K = np.zeros(REGIONS), np.zeros(REGIONS)
    for s in random_samples():
        for region in s.regions_T[1:][s.mask_T[1:]]:
            pulls_K[region] += WEIGHT_OF_REGION[region] * abs(s.advantage)
            count_K[region] += WEIGHT_OF_REGION[region] > 0
    np.testing.assert_allclose(on_one_rank["all"]["pulls"], [pulls_K, count_K], rtol=1e-6)


def test_clip_cov_silences_a_tenth(on_one_rank: dict[str, Any]) -> None:
    all_, heard = (on_one_rank[name]["pulls"][1].sum() for name in ("all", "clip-cov"))
    assert all_ - heard == round(0.1 * all_)


# ------------------------------------------------------------------ without a scoring pass


def _with_and_without(case: Any, sizes: dict[str, int]) -> Any:
    bench, answer = Bench(case, **sizes), []
    for loss in (LossConfig(), NO_SCORING):
        step = Step(bench, loss=loss)
        before = step.trainer.rows.region_sums(step.parts, step.scores, REGIONS)
        answer.append((before, step.take(step.parts)))
    return answer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_scoring_pass_gradients_and_entropies_are_the_same(
    layout: str, case: Any
) -> None:
    for (scored, want), (unknown, got) in run_ranks(_with_and_without, 2, case, LAYOUTS[layout]):
        same(got, want, 1e-6)
        np.testing.assert_allclose(scored, want["sums"])
        assert not np.any(unknown)


def _rows_at_the_head(case: Any) -> Any:
    from rest_mega.trainer import forward

    bench, counts, seen = Bench(case), [], []
    head = forward.linear_logprob_entropy

    def watched(hidden: Any, *args: Any, **more: Any) -> Any:
        seen.append(len(hidden))
        return head(hidden, *args, **more)

    forward.linear_logprob_entropy = watched
    for loss in (LossConfig(), NO_SCORING):
        seen[:] = []
        step = Step(bench, loss=loss)
        step.take(step.parts)
        counts.append(sum(seen))
    return counts


def test_without_a_scoring_pass_every_row_meets_the_head_once(case: Any) -> None:
    trained = sum(s.trained_tokens for s in random_samples())
    assert run_ranks(_rows_at_the_head, 1, case) == [[2 * trained, trained]]


def _two_parts(case: Any) -> Any:
    """Against the rollout's log-probs two steps need no scoring pass either."""
    bench, answer = Bench(case), []
    for scoring in (True, False):
        loss = LossConfig(old_logprobs="rollout", optimizer_steps=2, scoring=scoring)
        step = Step(bench, 2, loss)
        results = [step.trainer.step(*p) for p in zip(step.parts, step.scores, step.weights)]  # noqa: B905
        answer.append([(r.loss, r.grad_norm) for r in results])
    return answer


def test_two_steps_against_the_rollout_are_the_same_without_scoring(case: Any) -> None:
    scored, unscored = run_ranks(_two_parts, 1, case)[0]
    np.testing.assert_allclose(unscored, scored, rtol=1e-6)
