"""Two optimizer steps are the same at every layout, and the same as plain transformers and
autograd.

Through the real model, schedule, DDP and optimizer: log-probs, entropies, token weights, losses,
gradient norms, metrics, every gradient and every parameter. All layouts of one number of ranks run
one after another in the same processes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rest_mega.config import (
    CreditConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from tests.support.models import random_samples, save_model
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

TEMPERATURE = 0.7
REGIONS = 11
STEPS = 2
"""The second's gradients and update depend on the first's."""
LOSS = LossConfig(policy="ppo", clip_low=0.2, clip_high=0.3, dual_clip=3.0, old_logprobs="rollout")
ADAM = OptimizerConfig(lr=1e-2, eps=1e-2, weight_decay=0.1, clip_grad=0.0)
"""An eps that keeps Adam's first steps from being signs of gradients, which rounding may turn."""
METRICS = ("surrogate", "clip_fraction", "ratio", "approx_kl", "entropy")


@dataclass(frozen=True)
class Layout:
    """A number of ranks, how they share the model, and how the batch is cut."""

    ranks: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokens: int = 96
    """Of a micro-batch."""
    order: int = 0
    """Seed of the order of samples; 0: as they are."""
    distributed: bool = False
    """Whether the optimizer is."""


def layout(ranks: int, **sizes: Any) -> Layout:
    more = {k: sizes.pop(k) for k in ("tokens", "order", "distributed") if k in sizes}
    return Layout(ranks, ParallelConfig(**sizes), **more)


DENSE = {
    "1": layout(1),
    "short micro-batches": layout(1, tokens=49),
    "one micro-batch": layout(1, tokens=4096),
    "tp2": layout(2, tensor=2),
    "tp2 sp": layout(2, tensor=2, sequence=True),
    "pp2": layout(2, pipeline=2),
    "pp2 vpp2": layout(2, pipeline=2, virtual_pipeline=2),
    "dp2": layout(2),
    "dp2 in another order": layout(2, order=7),
    "cp2": layout(2, context=2),
    "dp2 distributed": layout(2, distributed=True, order=3),
    "pp4": layout(4, pipeline=4, tokens=64),
    "tp4 (more ranks than KV heads)": layout(4, tensor=4),
    "tp2 pp2": layout(4, tensor=2, pipeline=2),
    "tp2 pp2 vpp2 sp": layout(4, tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
    "dp2 pp2": layout(4, pipeline=2, order=5),
    "dp2 tp2 distributed": layout(4, tensor=2, distributed=True),
    "cp2 tp2 sp": layout(4, context=2, tensor=2, sequence=True),
}
SPREAD = {
    "1": layout(1),
    "ep2": layout(2, expert=2),
    "ep2 distributed": layout(2, expert=2, distributed=True, order=3),
    "tp2 sp ep2": layout(2, tensor=2, sequence=True, expert=2),
    "tp2 sp, experts on both": layout(2, tensor=2, sequence=True),
    "cp2 ep2": layout(2, context=2, expert=2),
    "dp4 ep2": layout(4, expert=2, distributed=True),
    "dp2 tp2 sp ep4": layout(4, tensor=2, sequence=True, expert=4),
}
WHOLE = {"tp2 pp2 sp": layout(4, tensor=2, pipeline=2, sequence=True)}
STAGED = {"pp2 ep2": layout(4, pipeline=2, expert=2, order=5)}
LAYOUTS: dict[str, dict[str, Layout]] = {
    "qwen3": DENSE,
    "qwen2": WHOLE,
    "llama": WHOLE,
    "llama_linear": WHOLE,
    "qwen3_moe": SPREAD | STAGED,
    "qwen3_moe_mixed": STAGED | {"pp2 vpp2": layout(2, pipeline=2, virtual_pipeline=2)},
    "mixtral": STAGED,
}
"""By family. The mixed one has no experts on the first of two stages, and probabilities as they
are."""
LAYERS = {"qwen3": 4, "qwen3_moe_mixed": 4}
"""As few as the family's layouts cut into stages; otherwise two."""
CASES = [(family, name) for family, layouts in LAYOUTS.items() for name in layouts]


# ------------------------------------------------------------------ ours


def two_steps(
    path: str,
    architecture: Any,
    one: Layout,
    model: ModelConfig = ModelConfig(),  # noqa: B008  # frozen
) -> dict[str, Any]:
    """What a fresh trainer measures in each step, its first gradients and its last parameters."""
    from rest_mega.credit import weights as credit
    from rest_mega.sync.load import load, open_source
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.trainer import Trainer

    place = places.start(one.parallel, "auto")
    trainer = Trainer(
        architecture,
        place,
        model=model,
        optimizer=OptimizerConfig(**(vars(ADAM) | {"distributed": one.distributed})),
        loss=LOSS,
        packing=PackingConfig(tokens=one.tokens),
        temperature=TEMPERATURE,
        total_steps=STEPS,
    )
    load(trainer.modules, open_source(path, "load", architecture, 0), architecture, place)
    trainer.prepare()
    (batches,) = trainer.pack(_samples(one.order)[place.data_rank :: place.data_size])
    answer: dict[str, Any] = {"steps": []}
    for _ in range(STEPS):
        (scores,) = trainer.score([batches])
        sums_K, counts_K = trainer.rows.region_sums([batches], [scores], REGIONS)
        raw_K = region_weights(sums_K, counts_K)
        weights = [credit.normalise(raw_K, b.regions_T, b.mask_T, b.sample_T) for b in batches]
        result = trainer.step(batches, scores, weights)
        metrics = [result.metrics[name] for name in METRICS]
        answer["steps"].append([result.loss, result.grad_norm, *metrics, *sums_K, *raw_K])
        if not one.distributed:  # else a rank keeps its own slice of the gradients only
            answer.setdefault("gradients", _gradients(trainer))
    answer["parameters"] = _whole(trainer)
    return answer


def _samples(order: int) -> list[Any]:
    samples = random_samples()
    if not order:
        return samples
    return [samples[i] for i in np.random.default_rng(order).permutation(len(samples))]


def region_weights(sums_K: Any, counts_K: Any) -> Any:
    """ResT's raw weights of the regions, by their mean entropies."""
    from rest_mega.credit import weights as credit

    means_K = np.asarray(sums_K) / np.maximum(counts_K, 1)
    return credit.region_weights(CreditConfig(), means_K, progress=0.5, step=1)


def _whole(trainer: Any) -> dict[str, Any]:
    from rest_mega.sync.export import Exporter

    stream = Exporter(trainer.modules, trainer.architecture, trainer.parallel).stream()
    return {name: tensor.float().numpy() for name, tensor in stream}


def _gradients(trainer: Any) -> dict[str, Any]:
    """The gradients of the step just taken, on their parameters' way."""
    import torch

    from rest_mega.sync.names import named_parameters

    parameters = [parameter for _, parameter in named_parameters(trainer.chunks)]
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        whole = _whole(trainer)
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return whole


# ------------------------------------------------------------------ transformers'


def reference(path: str) -> dict[str, Any]:
    """The same two steps by plain transformers, autograd and torch's AdamW."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decay, plain = ([p for p in model.parameters() if (p.ndim > 1) is x] for x in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": plain, "weight_decay": 0.0}],
        lr=ADAM.lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=ADAM.weight_decay,
    )  # fmt: skip
    steps: list[Any] = []
    gradients: dict[str, Any] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, measured = _plain_loss(model)
        loss.backward()
        squares = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters())
        steps.append([float(loss.detach()), np.sqrt(squares), *measured])
        gradients = gradients or _as_files(_with_gradients(model))
        optimizer.step()
    return {"steps": steps, "gradients": gradients, "parameters": _as_files(model)}


def _plain_loss(model: Any) -> tuple[Any, list[float]]:
    """(loss of the whole batch, metrics, region entropy sums and raw weights)."""
    import torch

    rows = [_rows(model, sample) for sample in random_samples()]
    entropy_R = torch.cat([row[1] for row in rows]).detach()
    regions_R = np.concatenate([row[2] for row in rows])
    sums_K = np.bincount(regions_R, weights=entropy_R.numpy(), minlength=REGIONS)
    raw_K = region_weights(sums_K, np.bincount(regions_R, minlength=REGIONS))
    total, weight, kept = torch.zeros(()), 0.0, []
    for logprob_R, _, mine_R, old_R, advantage in rows:
        raw_R = torch.from_numpy(raw_K[mine_R])
        weight_R = raw_R / raw_R[raw_R > 0].mean()
        a, ratio_R = torch.tensor(advantage, dtype=torch.float32), (logprob_R - old_R).exp()
        bounded_R = ratio_R.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
        loss_R = torch.max(-a * ratio_R, -a * bounded_R)
        clipped_R = -a * bounded_R > -a * ratio_R
        if a < 0:
            clipped_R = clipped_R | (loss_R > -a * LOSS.dual_clip)
            loss_R = torch.min(loss_R, -a * LOSS.dual_clip)
        total, weight = total + (weight_R * loss_R).sum(), weight + float(weight_R.sum())
        kept.append(torch.stack([loss_R, clipped_R, ratio_R, old_R - logprob_R]).detach())
    means = torch.cat(kept, dim=1).double().mean(dim=1).tolist()
    return total / weight, [*means, float(entropy_R.double().mean()), *sums_K, *raw_K]


def _rows(model: Any, sample: Any) -> tuple[Any, ...]:
    """Log-prob, entropy, region and the engine's log-prob of a sample's trained tokens; its
    advantage."""
    import torch

    mask_T = torch.from_numpy(sample.mask_T[1:])
    ids_T = torch.from_numpy(sample.ids_T.astype(np.int64))
    logprobs_TV = torch.log_softmax(model(ids_T[None]).logits[0, :-1] / TEMPERATURE, -1)
    logprob_R = logprobs_TV.gather(1, ids_T[1:, None])[:, 0][mask_T]
    entropy_R = -(logprobs_TV.exp() * logprobs_TV).sum(-1)[mask_T]
    regions_R = sample.regions_T[1:][sample.mask_T[1:]]
    old_R = torch.from_numpy(sample.logprobs_T[1:])[mask_T]
    return logprob_R, entropy_R, regions_R, old_R, sample.advantage


def _with_gradients(model: Any) -> Any:
    """A copy whose parameters are the gradients."""
    import torch

    other = copy.deepcopy(model)
    with torch.no_grad():
        for target, parameter in zip(other.parameters(), model.parameters(), strict=True):
            target.copy_(parameter.grad)
    return other


def _as_files(model: Any) -> dict[str, Any]:
    """The parameters under the names of checkpoint files: transformers holds all experts of a layer
    in one tensor, and cuts it when it saves."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return dict(load_file(f"{folder}/model.safetensors"))


# ------------------------------------------------------------------ both


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Family -> (path, architecture)."""
    from rest_mega.trainer.model import read_architecture

    paths = {
        f: str(save_model(tmp_path_factory.mktemp(f), f, num_hidden_layers=LAYERS.get(f, 2)))
        for f in LAYOUTS
    }
    return {family: (path, read_architecture(path)) for family, path in paths.items()}


@pytest.fixture(scope="module")
def wanted(models: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    cases = [(family, path) for family, (path, _) in models.items()]
    (answers,) = run_ranks(in_turn, 1, cases, reference, timeout=300)
    return dict(zip(models, answers, strict=True))


@pytest.fixture(scope="module")
def got(models: dict[str, tuple[str, Any]]) -> Callable[[str, str], list[Any]]:
    """(family, layout) -> every rank's answer."""
    made: dict[tuple[str, str], list[Any]] = {}

    def get(family: str, name: str) -> list[Any]:
        ranks = LAYOUTS[family][name].ranks
        if (family, name) not in made:
            mine = [case for case in CASES if LAYOUTS[case[0]][case[1]].ranks == ranks]
            cases = [(f"{f} {n}", *models[f], LAYOUTS[f][n]) for f, n in mine]
            answers = run_ranks(in_turn, ranks, cases, two_steps, timeout=300)
            made.update(zip(mine, zip(*answers, strict=True), strict=True))
        return made[family, name]

    return get


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda text: str(text))
def test_two_steps_are_transformers_at_every_layout(
    family: str, name: str, got: Callable[[str, str], list[Any]], wanted: dict[str, Any]
) -> None:
    want = wanted[family]
    for rank, answer in enumerate(got(family, name)):
        # A loss is a difference of terms of size one.
        np.testing.assert_allclose(answer["steps"], want["steps"], rtol=1e-5, atol=1e-6)
        for kind in answer.keys() & {"parameters", "gradients"}:
            assert rank or set(answer[kind]) == set(want[kind])
            for tensor, value in answer[kind].items():  # on leads
                expected = want[kind][tensor]
                bound = 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(
                    value, expected, atol=bound, rtol=0, err_msg=f"{kind} of {tensor}"
                )
