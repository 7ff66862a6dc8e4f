"""Weights on their way to a server: nothing wrong leaves, nothing is lost, the copy is equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.rollout.sglang_weights import (
    Bucket,
    Kept,
    buckets,
    checked,
    expected_shapes,
)
from tests.support.models import save_model

SHAPES = {"a": (2, 3), "b": (4,)}
GOOD = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(4))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3", num_hidden_layers=2)


def weights(model: Path) -> Bucket:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [(name, p.detach()) for name, p in loaded.named_parameters()]


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 200))
def test_buckets_hold_all_tensors_in_order_and_none_is_larger_than_it_must_be(
    sizes: list[int], limit: int
) -> None:
    stream = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    made = list(buckets(stream, limit))
    assert [name for bucket in made for name, _ in bucket] == [name for name, _ in stream]
    totals = [sum(t.nbytes for _, t in bucket) for bucket in made]
    assert all(t <= limit or len(b) == 1 for t, b in zip(totals, made, strict=True))
    assert all(t + after[0][1].nbytes > limit for t, after in zip(totals, made[1:], strict=False))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([("c", torch.ones(4))], r"'c' is None by its config\.json, not \(4,\)"),
        ([GOOD[0], GOOD[0]], "'a' is sent twice"),
        ([("a", torch.ones(3, 2))], r"'a' is \(2, 3\) by its config\.json, not \(3, 2\)"),
        (GOOD[:1], r"1 parameters were not sent to the server, for example \['b'\]"),
    ],
)
def test_names_and_shapes_that_the_config_does_not_know_are_refused(
    stream: Bucket, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(checked(stream, SHAPES, torch.float32))


def test_what_passes_the_check_is_unchanged_but_for_the_servers_dtype() -> None:
    for (name, tensor), (got, sent) in zip(
        GOOD, checked(iter(GOOD), SHAPES, torch.bfloat16), strict=True
    ):
        assert (name, sent.dtype) == (got, torch.bfloat16)
        assert torch.equal(sent, tensor.bfloat16())


def test_the_expected_shapes_are_those_of_the_checkpoint(model: Path) -> None:
    assert expected_shapes(str(model)) == {name: tuple(t.shape) for name, t in weights(model)}


def test_the_kept_copy_is_a_checkpoint_and_the_newest_one_alone(
    model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    kept = Kept(tmp_path / "weights", str(model))
    for version in (3, 4):
        kept.begin(version)
        moved = [(name, t + version) for name, t in weights(model)]
        for bucket in buckets(moved, 20_000):
            kept.add(bucket)
        kept.end()
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["version_4"]
    again = [pair for bucket in kept.read() for pair in bucket]
    loaded = dict(AutoModelForCausalLM.from_pretrained(kept.folder).named_parameters())
    assert len(again) == len(moved) == len(loaded)
    for name, tensor in moved:
        assert torch.equal(dict(again)[name], tensor)
        assert torch.equal(loaded[name], tensor)
    kept.close()
    assert not (tmp_path / "weights").exists()
