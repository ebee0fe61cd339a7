"""Recipes: all mistakes in one message, each with its file and line."""

from pathlib import Path

import pytest
from pydantic import Field, field_validator

from foundation.errors import ExitCode, RecipeError
from foundation.recipes import Section, differing_keys, load_recipe, recipe_hash, resolved_yaml


class Optimizer(Section):
    lr: float = Field(gt=0)
    warmup_steps: int = 0


class Recipe(Section):
    name: str
    steps: int = Field(gt=0)
    optimizer: Optimizer
    ratio: dict[int, float] = {}
    sizes: list[tuple[int, int]] = []

    @field_validator("name")
    @classmethod
    def not_empty(cls, name: str) -> str:
        if not name:
            raise ValueError("a run needs a name")
        return name


GOOD = "name: tiny\nsteps: 10\noptimizer:\n  lr: 1e-4\nratio: {256: 2, 512: 7}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_resolved_recipe_loads_back_to_itself(tmp_path):
    recipe = load_recipe(Recipe, write(tmp_path, GOOD))
    assert recipe.optimizer.lr == 1e-4 and recipe.ratio == {256: 2.0, 512: 7.0}
    again = load_recipe(Recipe, write(tmp_path, resolved_yaml(recipe)))
    assert again == recipe and recipe_hash(again) == recipe_hash(recipe)


def test_all_mistakes_come_in_one_message_with_their_lines(tmp_path):
    path = write(tmp_path, "name: tiny\nsteps: -3\noptimizer:\n  lr: fast\n  warmup_step: 7\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, path)
    message = str(caught.value)
    assert "3 problems" in message
    assert f"{path}:2: steps" in message and "-3" in message
    assert f"{path}:4: optimizer.lr" in message and "'fast'" in message
    assert f"{path}:5: optimizer.warmup_step" in message and "did you mean 'warmup_steps'?" in message
    assert caught.value.exit_code is ExitCode.RECIPE == 78


def test_missing_section_and_own_check(tmp_path):
    with pytest.raises(RecipeError, match="optimizer: is missing") as caught:
        load_recipe(Recipe, write(tmp_path, "name: ''\nsteps: 1\n"))
    assert "a run needs a name" in str(caught.value)


def test_duplicate_key_names_both_lines(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: steps is given twice \(first on line 2\)"):
        load_recipe(Recipe, write(tmp_path, "name: a\nsteps: 1\nsteps: 2\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1,\n", "is not YAML"), ("- 1\n- 2\n", "not a mapping"), ("", "name: is missing")],
)
def test_broken_files(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(Recipe, write(tmp_path, text))


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"does not exist; recipes there: .*recipe\.yaml"):
        load_recipe(Recipe, tmp_path / "recipes.yaml")


def test_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    overrides = ["optimizer.lr=3e-4", "ratio.256=1", "sizes=[[1, 2]]"]
    recipe = load_recipe(Recipe, path, overrides)
    assert recipe.optimizer.lr == 3e-4 and recipe.ratio[256] == 1 and recipe.sizes == [(1, 2)]
    with pytest.raises(RecipeError, match=r"--set optimizer.lr=-1: "):
        load_recipe(Recipe, path, ["optimizer.lr=-1"])
    with pytest.raises(RecipeError, match="expected key=value"):
        load_recipe(Recipe, path, ["steps"])


def test_differing_keys_are_named():
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}) == ["a.b: 1 -> 3"]


@pytest.mark.parametrize(
    "line",
    ["name: !!python/object:os.system 1", "? [a, b]\n: 1", "{a: 1}: 3", "name: &x [*x]"],
)
def test_yaml_that_is_no_recipe_is_refused(tmp_path, line):
    with pytest.raises(RecipeError):
        load_recipe(Recipe, write(tmp_path, f"steps: 1\n{line}\n"))


def test_merge_keys_and_dates_are_plain(tmp_path):
    text = "name: 2026-13-45\nsteps: 1\noptimizer: &base {lr: 1}\n"
    assert load_recipe(Recipe, write(tmp_path, text)).name == "2026-13-45"
    text = GOOD.replace("  lr: 1e-4\n", "  <<: {lr: 1e-4}\n")
    assert load_recipe(Recipe, write(tmp_path, text)).optimizer.lr == 1e-4
