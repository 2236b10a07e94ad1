"""Every configuration that ships loads, and every smoke configuration trains from an empty folder."""

from pathlib import Path

import pytest

from ssl_platform.recipe import load_recipe
from ssl_platform.train import main

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [path for kind in ("image", "pathology", "speaker", "spectrogram") for path in CONFIGS.glob(f"{kind}_*.yaml")]
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in RECIPES)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_loads_and_says_how_to_run_it(path: Path) -> None:
    load_recipe(path)  # those without data of their own are in test_recipes.py
    assert f"ssl-train {path.relative_to(CONFIGS.parent)}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("path", sorted((CONFIGS / "smoke").glob("*.yaml")), ids=lambda path: path.stem)
def test_smoke_configurations_train(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    steps = recipe.steps if recipe.stages else 3  # stages say how long they are
    assert main([str(path), f"run_dir={tmp_path / 'run'}", f"steps={steps}"]) == 0
    assert (tmp_path / f"run/checkpoints/step_{steps:08d}/state.json").is_file()
