"""Every surrogate, aggregation and correction is the same at every layout, and the same as plain
transformers and autograd.

Through the real trainer: loss, gradient norm, statistics of the gap, every gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rest_mega.config import LossConfig, OptimizerConfig
from tests.support.bench import TEMPERATURE, Bench, parameters, small_case
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

WEIGHT_OF_REGION = np.array([0.5, 1.0, 2.0, 0.25], dtype=np.float32)
CLIP = {"clip_low": 0.4, "clip_high": 0.3}
BAND = {"correction_low": 0.4, "correction_high": 1.6}
CHOICES = {
    "gspo sequence-mean sequence-mask": LossConfig(
        policy="gspo", aggregation="sequence-mean", correction="sequence-mask",
        old_logprobs="rollout", **CLIP, **BAND,
    ),
    "gspo weighted-token-mean": LossConfig(policy="gspo", old_logprobs="rollout", **CLIP),
    "cispo token-mean": LossConfig(
        policy="cispo", aggregation="token-mean", old_logprobs="rollout", **CLIP
    ),
    "ppo fixed mis": LossConfig(aggregation="fixed", fixed_length=32, correction="mis", **BAND),
    "reinforce sequence-mean tis": LossConfig(
        policy="reinforce", aggregation="sequence-mean", correction="tis", **BAND
    ),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {},
    "cp2": {"context": 2},
}


def all_choices(case: Any, sizes: dict[str, int], tokens: int) -> dict[str, Any]:
    """One step of every choice on this rank of a layout."""
    import torch

    from rest_mega.sync.export import Exporter
    from rest_mega.sync.names import named_parameters

    bench, answer = Bench(case, **sizes), {}
    mine = random_samples()[bench.place.data_rank :: bench.place.data_size]
    for name, loss in CHOICES.items():
        trainer = bench.trainer(tokens=tokens, loss=loss)
        (batches,) = trainer.pack(mine)
        (scores,) = trainer.score([batches])
        weights = [WEIGHT_OF_REGION[b.regions_T] for b in batches]
        result = trainer.step(batches, scores, weights)
        with torch.no_grad():
            for _, parameter in named_parameters(trainer.chunks):
                parameter.copy_(parameter.main_grad)
        exporter = Exporter(trainer.modules, bench.architecture, bench.place)
        gradients = {n: t.float().numpy().copy() for n, t in exporter.stream()}
        answer[name] = (result.loss, result.grad_norm, dict(result.metrics), gradients)
    return answer


def reference(path: str) -> dict[str, Any]:
    """The same in one process, sequence after sequence."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: _reference(torch, model, config) for name, config in CHOICES.items()}


def _reference(torch: Any, model: Any, config: LossConfig) -> Any:
    total, weight_sum, tokens, sequences = 0.0, 0.0, 0, 0
    gaps, factors, clipped = [], [], []
    for s in random_samples():
        mask = torch.from_numpy(s.mask_T[1:])
        ids = torch.from_numpy(s.ids_T.astype(np.int64))
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / TEMPERATURE, -1)
        logprob = logprobs.gather(1, ids[1:, None])[:, 0][mask]
        weight = torch.from_numpy(WEIGHT_OF_REGION[s.regions_T[1:]])[mask]
        engine, now = torch.from_numpy(s.logprobs_T[1:])[mask], logprob.detach()
        old = engine if config.old_logprobs == "rollout" else now
        loss, lost = surrogate(torch, config, logprob, old, s.advantage)
        factor = correction_factor(torch, config, now - engine)
        summed = (weight * factor * loss).sum()
        total = total + (summed / len(now) if config.aggregation == "sequence-mean" else summed)
        weight_sum, tokens = weight_sum + float(weight.sum()), tokens + len(now)
        sequences += 1
        gaps += (now - engine).abs().tolist()
        factors += factor.tolist()
        clipped += lost.tolist()
    denominator = {
        "weighted-token-mean": weight_sum,
        "token-mean": tokens,
        "sequence-mean": sequences,
        "fixed": sequences * config.fixed_length,
    }[config.aggregation]
    model.zero_grad()
    (total / denominator).backward()
    gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    metrics = {
        "rollout_gap": np.mean(gaps),
        "rollout_gap_max": max(gaps),
        "rollout_ratio": np.mean(factors),
        "rollout_masked": np.mean(np.array(factors) == 0),
        "clip_fraction": np.mean(clipped),
    }
    return float(total.detach()) / denominator, norm, metrics, gradients


def surrogate(torch: Any, config: LossConfig, logprob: Any, old: Any, a: float) -> Any:
    low, high, log_ratio = 1 - config.clip_low, 1 + config.clip_high, logprob - old
    if config.policy == "reinforce":
        return -a * logprob, torch.zeros_like(logprob)
    if config.policy == "cispo":
        ratio = log_ratio.detach().exp()
        return -ratio.clamp(low, high) * a * logprob, (ratio < low) | (ratio > high)
    if config.policy == "gspo":
        s = log_ratio.detach().mean().exp()
        side = float(s) > high if a > 0 else float(s) < low
        moving = s * (logprob - logprob.detach() + 1)
        value = torch.full_like(logprob, -a * (high if a > 0 else low))
        return (value if side else -a * moving), torch.full_like(logprob, side)
    return -a * log_ratio.exp(), torch.zeros_like(logprob)  # on-policy: nothing is clipped


def correction_factor(torch: Any, config: LossConfig, gap: Any) -> Any:
    low, high = BAND["correction_low"], BAND["correction_high"]
    if config.correction == "none":
        return torch.ones_like(gap)
    if config.correction == "sequence-mask":
        return torch.full_like(gap, low <= float(gap.mean().exp()) <= high)
    ratio = gap.exp()
    if config.correction == "tis":
        return torch.where(ratio > high, high, ratio)
    return ratio * ((ratio >= low) & (ratio <= high))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def want(case: tuple[str, Any]) -> dict[str, Any]:
    return run_ranks(reference, 1, case[0])[0]


def test_the_choices_clip_and_mask_some_and_spare_some(want: dict[str, Any]) -> None:
    for name, (_, _, metrics, _) in want.items():
        if name.startswith(("gspo", "cispo")):
            assert 0 < metrics["clip_fraction"] < 1, name
        if name.endswith(("mask", "mis")):
            assert 0 < metrics["rollout_masked"] < 1, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_choices_agree_with_plain_torch_in_every_gradient(
    layout: str, case: Any, want: dict[str, Any]
) -> None:
    world, tokens = (1 if layout == "1" else 2), (4096 if layout == "1" else 64)
    answers = run_ranks(all_choices, world, case, LAYOUTS[layout], tokens)
    for name, (loss, norm, metrics, gradients) in want.items():
        for got in answers:
            assert got[name][0] == pytest.approx(loss, rel=1e-5, abs=1e-7), name
            assert got[name][1] == pytest.approx(norm, rel=1e-5), name
            assert {m: got[name][2][m] for m in metrics} == pytest.approx(metrics, rel=1e-5), name
        exported = answers[0][name][3]
        assert set(exported) == set(gradients)
        for tensor, expected in gradients.items():
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(
                exported[tensor], expected, atol=atol, rtol=0, err_msg=f"{name}: {tensor}"
            )


def _all_masked(case: Any, sizes: dict[str, int]) -> Any:
    bench = Bench(case, **sizes)
    adam = OptimizerConfig(lr=0.1, distributed=False)
    trainer = bench.trainer(adam, loss=LossConfig(correction="mis", correction_low=4.9))
    far = [
        dataclasses.replace(s, logprobs_T=np.full_like(s.logprobs_T, -20.0))
        for s in random_samples()
    ]
    before = parameters(trainer)
    result = bench.step(trainer, far)
    same = all((before[n] == p).all() for n, p in parameters(trainer).items())
    return same, result.skipped, result.loss, result.metrics["rollout_masked"]


@pytest.mark.parametrize("sizes", [{}, {"pipeline": 2}, {"context": 2}])
def test_a_batch_that_is_masked_as_a_whole_moves_nothing_and_says_so(
    case: Any, sizes: dict[str, int]
) -> None:
    world = 2 if sizes else 1
    assert run_ranks(_all_masked, world, case, sizes) == [(True, True, 0.0, 1.0)] * world
