"""The load-balancing loss of a mixture of experts: the formula's gradient at every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.bench import Bench, small_case
from tests.support.models import random_samples
from tests.support.ranks import in_turn, run_ranks

pytestmark = pytest.mark.distributed

COEFFICIENT = 0.5
TOKENS = (8, 16, 24, 32)
"""Multiples of four: sequence and context parallelism add no padding, which is routed too."""
ONE_BATCH: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline": 2},
    "tp2 sp": {"tensor": 2, "sequence": True},
    "tp2 sp ep2": {"tensor": 2, "sequence": True, "expert": 2},
    "cp2 ep2": {"context": 2, "expert": 2},
}
TWO_BATCHES: dict[str, dict[str, Any]] = {"dp2": {}, "ep2": {"expert": 2}}


def samples() -> list[Any]:
    """Without advantage, so that the gradient is the balancing loss's alone."""
    longest = [s for s in random_samples(64) if len(s.ids_T) > max(TOKENS)]
    cut = [
        replace(s, **{n: getattr(s, n)[: t + 1] for n in ("ids_T", "mask_T", "regions_T")})
        for s, t in zip(longest, TOKENS, strict=False)
    ]
    return [replace(s, logprobs_T=s.logprobs_T[: len(s.ids_T)], advantage=0.0) for s in cut]


def balanced(case: Any, sizes: dict[str, Any]) -> Any:
    """(loss, gradients) of a step."""
    from rest_mega.sync.export import Exporter
    from rest_mega.sync.names import named_parameters

    bench = Bench(case, **sizes)
    trainer = bench.trainer(aux_loss=COEFFICIENT)
    place = bench.place
    loss = bench.step(trainer, samples()[place.data_rank :: place.data_size]).loss
    for _, parameter in named_parameters(trainer.chunks):
        parameter.data.copy_(parameter.main_grad)
    stream = Exporter(trainer.modules, bench.architecture, place).stream()
    return loss, {name: tensor.numpy() for name, tensor in stream}


def reference(path: str, replicas: int) -> dict[str, Any]:
    """Gradients of the mean over all tokens of E sum_e f_e P_e (Switch Transformer, arXiv
    2101.03961, equation 4, f over the k choices of every token), summed over layers; a replica's
    tokens are one micro-batch."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config, total = model.config, torch.zeros(())
    for mine in (samples()[rank::replicas] for rank in range(replicas)):
        for layer in range(config.num_hidden_layers):
            logits_TE = torch.cat([_router_logits(model, s, layer) for s in mine])
            probs_TE = logits_TE.softmax(-1)
            chosen_TE = torch.zeros_like(probs_TE).scatter(
                1, logits_TE.topk(config.num_experts_per_tok).indices, 1.0
            )
            f_E = chosen_TE.mean(0) / config.num_experts_per_tok
            loss = config.num_local_experts * (f_E * probs_TE.mean(0)).sum()
            total = total + len(logits_TE) * loss / sum(TOKENS)
    (COEFFICIENT * total).backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")}


def _router_logits(model: Any, sample: Any, layer: int) -> Any:
    import torch

    ids_T = torch.from_numpy(sample.ids_T[:-1].astype(np.int64))
    return model(ids_T[None], output_router_logits=True).router_logits[layer].flatten(0, -2)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return small_case(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.mark.parametrize(("replicas", "layouts"), [(1, ONE_BATCH), (2, TWO_BATCHES)])
def test_the_balancing_loss_moves_routers_as_its_formula_at_every_layout(
    replicas: int, layouts: dict[str, dict[str, Any]], case: tuple[str, Any]
) -> None:
    (want,) = run_ranks(reference, 1, case[0], replicas)
    cases = [(name, case, sizes) for name, sizes in layouts.items()]
    for name, (loss, gradients) in zip(
        layouts, run_ranks(in_turn, 2, cases, balanced)[0], strict=True
    ):
        assert loss == 0.0
        for tensor, expected in want.items():
            bound = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(
                gradients[tensor], expected, atol=bound, rtol=0, err_msg=f"{tensor} at {name}"
            )
