"""Every recipe's dry run at its real layout, and what a dry run refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from rest_mega.cli import main

ROOT = Path(__file__).parents[3]
RECIPES = {"qwen3_8b": 8, "qwen3_8b_split": 4, "llama3.2_3b": 8, "llama3.3_70b": 32}
RECIPES |= {"qwen3_1.7b": 8, "qwen3_4b": 8, "qwen3_14b": 8, "qwen3_30b_a3b": 16}
DENSE, MIXTURE = "examples/recipes/qwen3_1.7b.yaml", "examples/recipes/qwen3_30b_a3b.yaml"


def test_all_recipes_are_here() -> None:
    assert {path.stem for path in (ROOT / "examples" / "recipes").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_its_shapes_and_names_at_its_layout(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ranks = RECIPES[recipe]
    words = ["train", f"examples/recipes/{recipe}.yaml", "--dry-run", "--ranks", str(ranks)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"have their places on {ranks} ranks" in said
    assert "8,190 at most reach the head" in said
    assert ("experts were left out" in said) == (recipe == "qwen3_30b_a3b")


@pytest.mark.parametrize(
    ("layout", "ranks", "shape"),
    [
        ({"pipeline": 2, "virtual_pipeline": 2}, 2, "8190 x 2048"),
        ({"tensor": 4}, 4, "8190 x 2048"),
        ({"tensor": 4, "sequence": "true"}, 4, "2048 x 2048"),
        # Two trajectories of 4,095 predictions, each padded to a multiple of 2 CP x TP.
        ({"tensor": 2, "sequence": "true", "context": 2}, 4, "2048 x 2048"),
        ({"context": 2, "pipeline": 2}, 4, "4096 x 2048"),
    ],
    ids=str,
)
def test_a_micro_batch_goes_through_every_stage(
    layout: dict[str, object],
    ranks: int,
    shape: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    sizes = {"tensor": 1, "pipeline": 1, "sequence": "false"} | layout
    words = [f"parallel.{name}={size}" for name, size in sizes.items()]
    assert main(["train", DENSE, "--dry-run", "--ranks", str(ranks), *words]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(shape)]
    tensor = 2 if int(str(sizes["tensor"])) > 1 else 1
    assert len(rows) == tensor * int(str(sizes["pipeline"]))


def test_a_mixture_is_walked_without_its_experts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", "parallel.expert=4"]
    assert main(["train", MIXTURE, "--dry-run", "--ranks", "8", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("2048 x 2048") for line in said) == 4


def test_heads_that_cannot_be_cut_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["train", "examples/recipes/llama3.2_3b.yaml", "--dry-run", "parallel.tensor=7"]
    assert main(words) == 2
    assert "parallel.tensor=7 does not divide" in capsys.readouterr().err
