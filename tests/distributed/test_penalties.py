"""KL to a reference (in the loss, on the reward), entropy bonus and KL-Cov: at every layout the
step of plain transformers and autograd in fp64; and the reference leaves no trace."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_mega.config import CreditConfig, LossConfig, OptimizerConfig
from rest_mega.records import Sample
from tests.distributed.test_objectives import (
    BAND,
    CLIP,
    WEIGHT_OF_REGION,
    correction_factor,
    surrogate,
)
from tests.support.bench import TEMPERATURE, Bench, parameters, small_case
from tests.support.models import random_samples
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

UNIFORM = np.ones(4, dtype=np.float32)
PLAIN = CreditConfig()
KL_COV = {"tokens": "kl-cov", "kl_cov_share": 0.2, "kl_cov_coefficient": 0.7}
CHOICES: dict[str, tuple[LossConfig, CreditConfig, Any]] = {
    "k1 ppo token-mean": (
        LossConfig(kl=0.3, kl_estimator="k1", aggregation="token-mean"), PLAIN, WEIGHT_OF_REGION,
    ),
    "k2 gspo weighted-token-mean": (
        LossConfig(kl=0.3, kl_estimator="k2", policy="gspo", old_logprobs="rollout", **CLIP),
        PLAIN, WEIGHT_OF_REGION,
    ),
    "k3 ppo sequence-mean unscored": (
        LossConfig(kl=0.3, aggregation="sequence-mean", scoring=False), PLAIN, UNIFORM,
    ),
    "entropy reinforce fixed tis": (
        LossConfig(
            entropy_bonus=0.4, policy="reinforce", aggregation="fixed", fixed_length=32,
            correction="tis", **BAND,
        ),
        PLAIN, WEIGHT_OF_REGION,
    ),
    "kl-cov cispo weighted-token-mean": (
        LossConfig(policy="cispo", old_logprobs="rollout", **CLIP),
        CreditConfig(**KL_COV), WEIGHT_OF_REGION,
    ),
    "kl reward k1 ppo weighted-token-mean": (
        LossConfig(), CreditConfig(kl_reward=0.02), WEIGHT_OF_REGION,
    ),
    "k3 alone weighted-token-mean": (LossConfig(kl=0.3), PLAIN, 0 * WEIGHT_OF_REGION),
    "all of them, gspo sequence-mean": (
        LossConfig(
            kl=0.2, kl_estimator="k2", entropy_bonus=0.1, policy="gspo",
            aggregation="sequence-mean", old_logprobs="rollout", **CLIP,
        ),
        CreditConfig(
            kl_reward=0.05, kl_reward_estimator="k3", advantage="dr_grpo", **KL_COV
        ),
        WEIGHT_OF_REGION,
    ),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {},
    "cp2": {"context": 2},
}


def refer(bench: Bench, trainer: Any, path: str) -> None:
    """Make the weights in `path` the reference of a trainer that keeps its own."""
    from rest_mega.sync.load import load, open_source

    for folder in (path, bench.path):
        source = open_source(folder, "load", bench.architecture, 0)
        load(trainer.modules, source, bench.architecture, bench.place)
        if folder == path:
            trainer.keep_reference()


def all_choices(case: Any, other: str, sizes: dict[str, int], tokens: int) -> dict[str, Any]:
    """One step of every choice on this rank of a layout."""
    import torch

    from rest_mega.credit.advantages import token_rule
    from rest_mega.credit.assign import penalised
    from rest_mega.sync.export import Exporter
    from rest_mega.sync.names import named_parameters

    bench, answer = Bench(case, **sizes), {}
    size = 8 // bench.place.data_size
    mine = random_samples()[bench.place.data_rank * size :][:size]
    for name, (loss, credit, weight_of_region) in CHOICES.items():
        trainer = bench.trainer(tokens=tokens, loss=loss)
        refer(bench, trainer, other)
        parts, rows = trainer.pack(mine), trainer.rows
        scores = trainer.score(parts)
        kl_S = np.zeros(size)
        if credit.kl_reward:
            kl_S = rows.kl_of_samples(parts, scores, credit.kl_reward_estimator, size)
            advantage_S = penalised(mine, credit.kl_reward * kl_S, credit)
            parts = rows.with_advantages(parts, advantage_S)
        weights = [[weight_of_region[b.regions_T] for b in part] for part in parts]
        parts = rows.credit_tokens(parts, scores, weights, token_rule(credit, 1))
        result = trainer.step(parts[0], scores[0], weights[0])
        with torch.no_grad():
            for _, parameter in named_parameters(trainer.chunks):
                parameter.copy_(parameter.main_grad)
        exporter = Exporter(trainer.modules, bench.architecture, bench.place)
        gradients = {n: t.float().numpy().copy() for n, t in exporter.stream()}
        answer[name] = (result.loss, result.grad_norm, dict(result.metrics), gradients)
        answer[f"{name}: kl"] = kl_S.tolist()
    return answer


# ------------------------------------------------------------------ the same in one process


def plain(path: str, other: str) -> dict[str, Any]:
    """Every choice's step by transformers in fp64, sequence after sequence."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, reference = (load(p, dtype=torch.float64) for p in (path, other))
    return {name: _plain(torch, model, reference, *choice) for name, choice in CHOICES.items()}


def _plain(
    torch: Any, model: Any, reference: Any, config: LossConfig, credit: CreditConfig, weights: Any
) -> Any:
    samples, columns = random_samples(), []
    for s in samples:
        logprob, entropy = _rows(torch, model, s)
        with torch.no_grad():
            known, _ = _rows(torch, reference, s)
        mask = s.mask_T[1:]
        engine = torch.from_numpy(s.logprobs_T[1:][mask].astype(np.float64))
        weight = torch.from_numpy(weights[s.regions_T[1:][mask]].astype(np.float64))
        columns.append((logprob, entropy, known, engine, weight))
    far = [logprob.detach() - known for logprob, _, known, _, _ in columns]
    kl = [float(_k(credit.kl_reward_estimator, d).sum()) for d in far]
    advantage = [s.advantage for s in samples]
    if credit.kl_reward:
        rewards = np.array([s.reward for s in samples]) - credit.kl_reward * np.array(kl)
        advantage = _advantages(rewards.reshape(2, 4), credit.advantage)
    chosen = _highest_covariance(columns, advantage, credit)
    total, penalties, counts = 0.0, 0.0, np.zeros(3)
    for (logprob, entropy, known, engine, weight), a, hot in zip(columns, advantage, chosen):  # noqa: B905
        now = logprob.detach()
        old = engine if config.old_logprobs == "rollout" else now
        value, _ = surrogate(torch, config, logprob, old, a)
        share = 1 / len(now) if config.aggregation == "sequence-mean" else 1.0
        corrected = weight * correction_factor(torch, config, now - engine)
        penalty = config.kl * _k(config.kl_estimator, logprob - known)
        penalty = penalty - config.entropy_bonus * entropy
        penalty = penalty + credit.kl_cov_coefficient * hot * (logprob - old).abs()
        total = total + share * (corrected * value).sum()
        penalties = penalties + share * penalty.sum()
        counts += (float(weight.sum()), len(now), 1)
    by_weights, by_ones = {
        "weighted-token-mean": (counts[0], counts[1]),
        "token-mean": (counts[1], counts[1]),
        "sequence-mean": (counts[2], counts[2]),
        "fixed": (counts[2] * config.fixed_length,) * 2,
    }[config.aggregation]
    loss = total / (by_weights or 1.0) + penalties / by_ones
    model.zero_grad()
    loss.backward()
    gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    metrics = {"reference_kl": float(sum(_k("k3", d).sum() for d in far)) / counts[1]}
    return float(loss.detach()), norm, metrics, gradients, kl, sum(map(sum, chosen))


def _rows(torch: Any, model: Any, s: Sample) -> Any:
    mask, ids = torch.from_numpy(s.mask_T[1:]), torch.from_numpy(s.ids_T.astype(np.int64))
    logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / TEMPERATURE, -1)[mask]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, ids[1:, None][mask])[:, 0], entropy


def _k(name: str, d: Any) -> Any:
    return {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[name]


def _advantages(rewards_PG: Any, method: str) -> list[float]:
    centred = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if method == "grpo":
        centred = centred / (rewards_PG.std(1, ddof=1, keepdims=True) + 1e-6)
    return [float(a) for a in centred.ravel()]


def _highest_covariance(columns: Any, advantage: list[float], credit: CreditConfig) -> list[Any]:
    """Per sequence, 1 for the tokens that KL-Cov penalises."""
    import torch

    if credit.tokens != "kl-cov":
        return [torch.zeros(len(c[0])) for c in columns]
    logprob = torch.cat([c[0].detach() for c in columns])
    a = torch.cat([torch.full((len(c[0]),), x) for c, x in zip(columns, advantage)])  # noqa: B905
    covariance = (logprob - logprob.mean()) * (a - a.double().mean())
    kept = covariance.argsort(descending=True)[: round(credit.kl_cov_share * len(a))]
    hot = torch.zeros(len(a)).index_fill(0, kept, 1.0)
    return list(hot.split([len(c[0]) for c in columns]))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def other(case: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint some way off that of `case`."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("other")
    shutil.copy(Path(case[0]) / "config.json", folder)
    rng = np.random.default_rng(0)
    tensors = load_file(Path(case[0]) / "model.safetensors")
    moved = {n: t + 0.03 * rng.normal(size=t.shape).astype(t.dtype) for n, t in tensors.items()}
    save_file(moved, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def want(case: tuple[str, Any], other: str) -> dict[str, Any]:
    return dict(run_ranks(plain, 1, case[0], other)[0])


def test_the_reference_is_far_enough_and_some_tokens_are_chosen(want: dict[str, Any]) -> None:
    for name, (_, _, metrics, _, _, chosen) in want.items():
        assert metrics["reference_kl"] > 0.01
        assert (chosen > 5) == ("kl-cov" in name or "all" in name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_penalties_agree_with_plain_torch_in_every_gradient(
    layout: str, case: Any, other: str, want: dict[str, Any]
) -> None:
    answers = run_ranks(all_choices, 2, case, other, LAYOUTS[layout], 64)
    for name, (loss, norm, metrics, gradients, kl, _) in want.items():
        for rank, got in enumerate(answers):
            assert got[name][0] == pytest.approx(loss, rel=1e-5, abs=1e-7), name
            assert got[name][1] == pytest.approx(norm, rel=1e-5), name
            assert {m: got[name][2][m] for m in metrics} == pytest.approx(metrics, rel=1e-5), name
            if CHOICES[name][1].kl_reward:
                mine = kl if layout != "dp2" else kl[4 * rank :][:4]
                assert got[f"{name}: kl"] == pytest.approx(mine, rel=1e-5)
        exported = answers[0][name][3]
        assert set(exported) == set(gradients)
        for tensor, expected in gradients.items():
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(
                exported[tensor], expected, atol=atol, rtol=0, err_msg=f"{name}: {tensor}"
            )


# ------------------------------------------------------------------ parts and order


def _order_and_parts(case: Any, other: str) -> Any:
    bench, samples = Bench(case), random_samples()
    trainer = bench.trainer(tokens=64)
    refer(bench, trainer, other)
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    answer = []
    for chosen, count in ((range(8), 1), (order, 1), (order, 3)):
        parts = trainer.pack([samples[i] for i in chosen], count)
        kl_S = trainer.rows.kl_of_samples(parts, trainer.score(parts), "k3", 8)
        numbered = trainer.rows.with_advantages(parts, np.array(chosen, np.float32) + 1)
        lengths = np.zeros(9, dtype=int)
        for batch in (b for part in numbered for b in part):
            lengths += np.bincount(batch.advantages_T.astype(int), minlength=9)
            assert not batch.advantages_T[batch.sample_T < 0].any()
        answer.append(([kl_S[list(chosen).index(i)] for i in range(8)], lengths[1:].tolist()))
    return answer


def test_a_sample_s_kl_and_advantage_follow_it_through_any_order_and_number_of_parts(
    case: Any, other: str
) -> None:
    answers = run_ranks(_order_and_parts, 1, case, other)[0]
    for kl, lengths in answers:
        assert kl == pytest.approx(answers[0][0], rel=1e-5)
        assert lengths == [len(s.ids_T) - 1 for s in random_samples()]


# ------------------------------------------------------------------ the reference


def _traces(case: Any, other: str) -> Any:
    """Whether a reference that is only measured leaves parameters and scores as they are without,
    and scores as a trainer with its parameters does; in fp32 and bf16."""
    bench, adam, same = Bench(case), OptimizerConfig(lr=1e-2), []
    for dtype in ("fp32", "bf16"):
        trainers = [bench.trainer(adam, dtype) for _ in range(2)]
        refer(bench, trainers[1], other)
        for trainer in trainers * 2:
            bench.step(trainer, random_samples())
        before, after = (parameters(trainer) for trainer in trainers)
        same.append(all((before[n] == p).all() for n, p in after.items()))
        trainers.append(bench.trainer(adam, dtype, path=other))
        without, compared, alone = (t.score(t.pack(random_samples()))[0][0] for t in trainers)
        same.append(bool((without.logprob_R == compared.logprob_R).all()))
        same.append(bool((alone.logprob_R == compared.reference_R).all()))
    return same


def test_a_reference_leaves_no_bit_changed_and_scores_as_its_own_model_would(
    case: Any, other: str
) -> None:
    assert run_ranks(_traces, 2, case, other) == [[True] * 6] * 2
