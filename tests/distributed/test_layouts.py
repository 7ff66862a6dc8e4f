"""One optimizer step is the same at every layout, and the same as plain transformers and autograd.

Through the real model, schedule, DDP and optimizer: log-probs, entropies, loss, gradient norm,
every gradient.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest

from rest_mega.config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig
from tests.support.models import random_samples, save_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

TEMPERATURE = 0.7
REGIONS = 4
WEIGHT_OF_REGION = np.array([0.5, 1.0, 2.0, 0.25], dtype=np.float32)
LOSS = LossConfig(policy="ppo", clip_low=0.2, clip_high=0.3, dual_clip=3.0, old_logprobs="rollout")


def one_step(
    path: str,
    parallel: ParallelConfig,
    tokens: int,
    distributed: bool,
    order: int,
    model: ModelConfig = ModelConfig(),  # noqa: B008  # frozen
) -> dict[str, Any]:
    import torch

    from rest_mega.sync.export import Exporter
    from rest_mega.sync.load import load, open_source
    from rest_mega.sync.names import named_parameters
    from rest_mega.trainer import parallel as places
    from rest_mega.trainer.model import read_architecture
    from rest_mega.trainer.trainer import Trainer

    place = places.start(parallel, "auto")
    architecture = read_architecture(path)
    trainer = Trainer(
        architecture,
        place,
        model=model,
        optimizer=OptimizerConfig(lr=1e-6, clip_grad=0.0, distributed=distributed),
        loss=LOSS,
        packing=PackingConfig(tokens=tokens),
        temperature=TEMPERATURE,
        total_steps=1,
    )
    load(trainer.modules, open_source(path, "load", architecture, 0), architecture, place)
    trainer.prepare()
    samples = random_samples()
    permuted = (
        [samples[i] for i in np.random.default_rng(order).permutation(len(samples))]
        if order
        else samples
    )
    parts = trainer.pack(permuted[place.data_rank :: place.data_size])
    scores = trainer.score(parts)
    sums_K, counts_K = trainer.rows.region_sums(parts, scores, REGIONS)
    weights = [WEIGHT_OF_REGION[b.regions_T] for b in parts[0]]
    result = trainer.step(parts[0], scores[0], weights)
    answer = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "metrics": dict(result.metrics),
        "entropy_K": sums_K,
        "count_K": counts_K,
        "gradients": {},
    }
    if (
        not distributed
    ):  # with the distributed optimizer a rank keeps its own slice of the gradients only
        with torch.no_grad():
            for _, parameter in named_parameters(trainer.chunks):
                parameter.copy_(parameter.main_grad)
        answer["gradients"] = {
            n: t.float().numpy() for n, t in Exporter(trainer.modules, architecture, place).stream()
        }
    places.stop()
    return answer


def _as_files(model: Any) -> dict[str, Any]:
    """The gradients of a transformers model under the names of checkpoint files: it holds all
    experts of a layer in one tensor, and cuts it when it saves."""
    import torch
    from safetensors.numpy import load_file

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
        model.save_pretrained(folder)
        return dict(load_file(f"{folder}/model.safetensors"))


def reference(path: str) -> dict[str, Any]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total, norm_of_weights = 0.0, 0.0
    entropy_K, count_K = np.zeros(REGIONS), np.zeros(REGIONS)
    gaps = []
    for s in random_samples():
        mask = torch.from_numpy(s.mask_T[1:])
        logits = (
            model(torch.from_numpy(s.ids_T.astype(np.int64))[None]).logits[0, :-1] / TEMPERATURE
        )
        logprobs = torch.log_softmax(logits, -1)
        logprob = logprobs.gather(1, torch.from_numpy(s.ids_T[1:].astype(np.int64))[:, None])[:, 0][
            mask
        ]
        entropy = -(logprobs.exp() * logprobs).sum(-1)[mask]
        weight = torch.from_numpy(WEIGHT_OF_REGION[s.regions_T[1:]])[mask]
        old = torch.from_numpy(s.logprobs_T[1:])[mask]
        ratio = (logprob - old).exp()
        a = torch.tensor(s.advantage, dtype=torch.float32)
        loss = torch.max(-a * ratio, -a * ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high))
        if s.advantage < 0:
            loss = torch.min(loss, -a * LOSS.dual_clip)
        total = total + (weight * loss).sum()
        norm_of_weights += float(weight.sum())
        regions = s.regions_T[1:][s.mask_T[1:]]
        entropy_K += np.bincount(regions, weights=entropy.detach().numpy(), minlength=REGIONS)
        count_K += np.bincount(regions, minlength=REGIONS)
        gaps.append((logprob.detach() - old).numpy())
    loss = total / norm_of_weights
    loss.backward()
    gradients = _as_files(model)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    return {
        "loss": float(loss.detach()), "grad_norm": norm, "gradients": gradients,
        "entropy_K": entropy_K, "count_K": count_K,
        "approx_kl": -float(np.concatenate(gaps).mean()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def get(family: str) -> tuple[str, dict[str, Any]]:
        if family not in made:
            path = str(save_model(tmp_path_factory.mktemp(family), family))
            made[family] = (path, run_ranks(reference, 1, path)[0])
        return made[family]

    return get


LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(),
    "cp2": ParallelConfig(context=2),
    "tp2 sp": ParallelConfig(tensor=2, sequence=True),
    "pp2 vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tp2 pp2 sp": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "tp4 (more ranks than KV heads)": ParallelConfig(tensor=4),
    "dp2 pp2": ParallelConfig(pipeline=2),
    "cp2 tp2 sp": ParallelConfig(context=2, tensor=2, sequence=True),
}


def _world(name: str, parallel: ParallelConfig) -> int:
    return parallel.replica_size * (2 if name.startswith("dp2") else 1)


def _check(name: str, path: str, want: dict[str, Any], **more: Any) -> None:
    parallel = LAYOUTS[name]
    settings = {"tokens": 64, "distributed": False, "order": 0} | more
    answers = run_ranks(one_step, _world(name, parallel), path, parallel, *settings.values())
    for got in answers:
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert got["metrics"]["approx_kl"] == pytest.approx(want["approx_kl"], rel=1e-5)
        np.testing.assert_array_equal(got["count_K"], want["count_K"])
        np.testing.assert_allclose(got["entropy_K"], want["entropy_K"], rtol=1e-5)
    if not settings["distributed"]:
        gradients = answers[0]["gradients"]
        assert set(gradients) == set(want["gradients"])
        for tensor, gradient in gradients.items():
            expected = want["gradients"][tensor]
            np.testing.assert_allclose(
                gradient, expected, atol=1e-5 * np.abs(expected).max(), rtol=0, err_msg=tensor
            )


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree_with_transformers_in_every_gradient(name: str, case: Any) -> None:
    _check(name, *case("qwen3"))


@pytest.mark.parametrize("family", ["qwen2", "llama", "llama_linear"])
def test_families_agree_with_transformers(family: str, case: Any) -> None:
    _check("tp2 pp2 sp", *case(family))


@pytest.mark.parametrize("tokens", [49, 4096])
def test_the_cut_into_micro_batches_changes_nothing(tokens: int, case: Any) -> None:
    _check("1", *case("qwen3"), tokens=tokens)


def test_the_order_of_samples_changes_nothing(case: Any) -> None:
    _check("dp2", *case("qwen3"), order=7)


def test_the_distributed_optimizer_sees_the_same_gradients(case: Any) -> None:
    _check("dp2 pp2", *case("qwen3"), distributed=True)
