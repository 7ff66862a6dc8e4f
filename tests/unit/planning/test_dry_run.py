"""Every recipe's dry run at its real layout, and what a dry run refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from rest_mega.cli import main

ROOT = Path(__file__).parents[3]
RECIPES = {"qwen3_8b": 8, "qwen3_8b_split": 4, "llama3.2_3b": 8, "llama3.3_70b": 32}
RECIPES |= {"qwen3_1.7b": 8, "qwen3_4b": 8, "qwen3_14b": 8, "qwen3_30b_a3b": 16}


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
    assert f"have their places on {ranks} ranks" in capsys.readouterr().out


def test_heads_that_cannot_be_cut_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["train", "examples/recipes/llama3.2_3b.yaml", "--dry-run", "parallel.tensor=7"]
    assert main(words) == 2
    assert "parallel.tensor=7 does not divide" in capsys.readouterr().err
