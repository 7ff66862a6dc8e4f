"""The embedded engine samples what the softmax says, and nothing but the seed decides what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_mega.rollout.embedded_engine import EmbeddedEngine
from rest_mega.rollout.engine import Completion, Request, Sampling, seed_of
from tests.support.models import save_model

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 60}
ENDS = (0, 7)
GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    path = save_model(tmp_path_factory.mktemp("qwen3"), "qwen3", **SIZES)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def engine_of(
    model: Any, batch_size: int = 8, version: int = 5, ends: Sequence[int] = ENDS
) -> EmbeddedEngine:
    engine = EmbeddedEngine(
        model.name_or_path,
        end_of_turn_ids=ends,
        pad_id=1,
        batch_size=batch_size,
        dtype="fp32",
        device=torch.device("cpu"),
    )
    assert engine.version == -1
    engine.load_parameters(model.named_parameters(), version)
    return engine


def requests(count: int, longest: int = 12) -> list[Request]:
    """Prompts and limits of many lengths."""
    rng = np.random.default_rng(0)
    return [
        Request(
            rng.integers(0, SIZES["vocab_size"], rng.integers(1, 20)).astype(np.int32),
            int(rng.integers(1, longest + 1)),
            seed_of("request", n),
        )
        for n in range(count)
    ]


def assert_same(got: list[Completion], want: list[Completion]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.ids_T.tolist() == other.ids_T.tolist()
        assert one.finished == other.finished
        assert one.version_T.tolist() == other.version_T.tolist()
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, atol=1e-5)


@torch.no_grad()
def test_greedy_completions_are_those_of_transformers(model: Any) -> None:
    asked, ends = requests(24), range(0, 60, 5)  # enough of them that some completions end
    done = engine_of(model, ends=ends).generate(asked, GREEDY)
    for request, completion in zip(asked, done, strict=True):
        ids = torch.from_numpy(request.ids_T.astype(np.int64))[None]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1,
            max_new_tokens=request.max_new_tokens, eos_token_id=list(ends),
        )  # fmt: skip
        assert completion.ids_T.tolist() == out[0, ids.shape[1] :].tolist()
        assert completion.version_T.tolist() == [5] * len(completion.ids_T)
    assert len({c.finished for c in done}) == 2


@pytest.mark.parametrize("sampling", [Sampling(0.6), Sampling(1.7, top_p=0.5), GREEDY])
@torch.no_grad()
def test_logprobs_are_those_of_a_fresh_forward_pass_at_the_temperature(
    model: Any, sampling: Sampling
) -> None:
    asked = requests(16)
    for request, done in zip(asked, engine_of(model).generate(asked, sampling), strict=True):
        whole = torch.from_numpy(np.concatenate([request.ids_T, done.ids_T]).astype(np.int64))
        logits = model(whole[None, :-1]).logits[0, len(request.ids_T) - 1 :].double()
        logprobs = torch.log_softmax(logits / sampling.temperature, dim=-1)
        want = logprobs.gather(1, whole[len(request.ids_T) :, None])[:, 0]
        np.testing.assert_allclose(done.logprobs_T, want.numpy(), atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.8)])
def test_what_is_sampled_depends_neither_on_the_batch_nor_on_its_order(
    model: Any, sampling: Sampling
) -> None:
    asked = requests(16)
    want = engine_of(model).generate(asked, sampling)
    assert_same(engine_of(model, batch_size=1).generate(asked, sampling), want)
    assert_same(engine_of(model, batch_size=99).generate(asked[5:11], sampling), want[5:11])
    order = np.random.default_rng(1).permutation(len(asked))
    shuffled = engine_of(model, batch_size=5).generate([asked[i] for i in order], sampling)
    assert_same(shuffled, [want[i] for i in order])
    assert engine_of(model).generate([], sampling) == []


def test_the_seed_alone_decides_between_completions_of_one_prompt(model: Any) -> None:
    ids = np.array([3, 4], np.int32)
    asked = [Request(ids, 12, seed) for seed in (1, 2, 1)]
    one, other, again = engine_of(model).generate(asked, Sampling())
    assert_same([again], [one])
    assert one.ids_T.tolist() != other.ids_T.tolist()


def test_a_turn_ends_with_its_first_end_token_or_at_its_own_limit(model: Any) -> None:
    asked = [Request(r.ids_T, 12, r.seed) for r in requests(64)]
    whole = engine_of(model, batch_size=32).generate(asked, Sampling())
    for done in whole:
        assert not np.isin(done.ids_T[:-1], ENDS).any()
        assert done.finished == (done.ids_T[-1] in ENDS)
        assert done.finished or len(done.ids_T) == 12
    assert {len(c.ids_T) for c in whole if c.finished} > {2, 5}
    limits = np.random.default_rng(2).integers(1, 13, len(asked))
    cut = [Request(r.ids_T, int(n), r.seed) for r, n in zip(asked, limits, strict=True)]
    want = [
        Completion(c.ids_T[:n], c.logprobs_T[:n], c.finished and len(c.ids_T) <= n, c.version_T[:n])
        for c, n in zip(whole, limits, strict=True)
    ]
    assert_same(engine_of(model).generate(cut, Sampling()), want)


def first_two_tokens(model: Any, sampling: Sampling, count: int) -> np.ndarray:
    """Counts [V, V] of the first two tokens (the second is -1, the last column, after an end)."""
    ids = np.array([9, 2, 11], np.int32)
    asked = [Request(ids, 2, seed_of("draw", n)) for n in range(count)]
    vocab = SIZES["vocab_size"]
    counts = np.zeros((vocab, vocab + 1))
    for done in engine_of(model, batch_size=1000).generate(asked, sampling):
        first, second = (*done.ids_T.tolist(), -1)[:2]
        counts[first, second] += 1
    return counts


@torch.no_grad()
def probabilities(model: Any, sampling: Sampling) -> np.ndarray:
    """The same table by the chain rule, nucleus by its definition."""

    def softmax(ids: list[int]) -> np.ndarray:
        logits = model(torch.tensor([ids])).logits[0, -1].double() / sampling.temperature
        p = torch.softmax(logits, -1).numpy()
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(p[order].cumsum(), sampling.top_p)) + 1]
        q = np.zeros_like(p)
        q[kept] = p[kept]
        return np.asarray(q / q.sum())

    first = softmax([9, 2, 11])
    rows = [
        np.eye(len(first) + 1)[-1] if t in ENDS else np.append(softmax([9, 2, 11, t]), 0.0)
        for t in range(len(first))
    ]
    return np.asarray(first[:, None] * np.stack(rows))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(1.2, top_p=0.6)])
def test_the_sampled_distribution_is_the_models(model: Any, sampling: Sampling) -> None:
    count = 4000
    counts, expected = first_two_tokens(model, sampling, count), probabilities(model, sampling)
    expected = expected * count
    assert counts[expected == 0].sum() == 0  # outside the nucleus nothing is drawn
    # Pearson's chi-square over cells of at least five; the rest is one cell.
    common = expected >= 5
    seen = np.append(counts[common], counts[~common].sum())
    want = np.append(expected[common], expected[~common].sum() + 1e-9)
    chi_square, freedom = ((seen - want) ** 2 / want).sum(), len(want) - 1
    assert freedom > 5
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_parameters_that_do_not_fit_are_named_and_the_version_stays(model: Any) -> None:
    engine = engine_of(model, version=5)
    named = dict(model.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"1 parameters were not sent .*\['model.layers.1.mlp.up"):
        engine.load_parameters([p for p in named.items() if p[0] != name], 6)
    with pytest.raises(
        ValueError, match=r"shape \(48, 32\) for '.*up_proj.weight', not \(48, 31\)"
    ):
        engine.load_parameters((named | {name: named[name][:, 1:]}).items(), 6)
    with pytest.raises(ValueError, match=r"shape None for 'lm_head\.bias'"):
        engine.load_parameters({"lm_head.bias": torch.zeros(60)}.items(), 6)
    assert engine.version == 5
    engine.close()


def test_new_parameters_are_served_under_their_version(model: Any) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    engine, asked = engine_of(model), requests(4)
    engine.load_parameters(other.named_parameters(), 6)
    assert_same(
        engine.generate(asked, Sampling()), engine_of(other, version=6).generate(asked, Sampling())
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_taken_one_by_one_as_checkpoint_files_hold_them(
    family: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = save_model(tmp_path, family, **(SIZES | {"num_hidden_layers": 1}))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = EmbeddedEngine(
        str(path),
        end_of_turn_ids=ENDS,
        pad_id=1,
        batch_size=8,
        dtype="fp32",
        device=torch.device("cpu"),
    )
    engine.load_parameters(load_file(path / "model.safetensors").items(), 1)
    asked = requests(3)
    for request, got in zip(asked, engine.generate(asked, GREEDY), strict=True):
        ids_T = torch.from_numpy(np.concatenate([request.ids_T, got.ids_T]).astype(np.int64))
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids_T[None]).logits[0], -1)
        answer = logprobs_TV[len(request.ids_T) - 1 : -1]
        assert answer.argmax(-1).tolist() == got.ids_T.tolist()
        np.testing.assert_allclose(answer.amax(-1).numpy(), got.logprobs_T, atol=1e-5)
