"""Recipes: all mistakes in one message, each with its file and line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from foundation.errors import ExitCode, RecipeError
from foundation.ownership import taken_by_another
from foundation.recipes import differing_keys, load_recipe, recipe_hash, resolved_yaml
from foundation.sections import Problem, Section, check


class Optimizer(Section):
    lr: float = Field(gt=0)
    final_lr: float = 0.0
    warmup_steps: int = 0

    @check
    def _falls(self) -> Iterator[Problem]:
        if self.final_lr > self.lr:
            yield "final_lr", f"{self.final_lr} is above lr ({self.lr})"


class Phase(Section):
    steps: int = Field(gt=0)
    first: int = 0

    @check
    def _begins_before_it_ends(self) -> Iterator[Problem]:
        if self.first >= self.steps:
            yield "", f"begins at {self.first} of {self.steps}"


class Above(Section):
    rule: Literal["above"]
    value: float
    missing: Literal["drop", "keep"] = "drop"


class Between(Section):
    rule: Literal["between", "outside"]
    low: float | None = None
    high: float | None = None
    missing: Literal["drop", "keep"] = "drop"

    @check
    def _has_a_bound(self) -> Iterator[Problem]:
        if self.low is None and self.high is None:
            yield "", f"{self.rule} needs low or high"


Rule = Annotated[Above | Between, Field(discriminator="rule")]


class Recipe(Section):
    name: str
    steps: int = Field(gt=0)
    optimizer: Optimizer
    ratio: dict[int, float] = {}
    sizes: list[tuple[int, int]] = []
    phases: list[Phase] = []
    rules: list[Rule] = []
    then: Optimizer | None = None

    @check
    def _warms_up(self) -> Iterator[Problem]:
        if self.optimizer.warmup_steps > self.steps:
            yield "optimizer.warmup_steps", f"{self.optimizer.warmup_steps} is above steps ({self.steps})"

    @check
    def _phases_fill_the_run(self) -> Iterator[Problem]:
        for number, phase in enumerate(self.phases):
            if phase.steps > self.steps:
                yield f"phases.{number}.steps", f"{phase.steps} is above steps ({self.steps})"

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


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the message, without the heading and the folder."""
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, path, overrides)
    heading, *lines = str(caught.value).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert heading == f"The recipe {path} cannot be used ({count}):"
    return [line.replace(f"{path}:", "").strip() for line in lines]


def test_fields_that_disagree_are_told_with_the_mistakes_in_others(tmp_path):
    text = """
nam: tiny
steps: 10
optimizer:
  lr: 0.1
  final_lr: 0.5
  warmup_steps: 20
ratio: {256: many}
phases:
  - {steps: 5, first: 7}
  - {steps: 50}
  - {steps: soon}
"""
    assert problems_of(tmp_path, text) == [
        "name: is missing (add it)",
        "2: nam: unknown key 'nam' (did you mean 'name'?)",
        "6: optimizer.final_lr: 0.5 is above lr (0.1)",
        "7: optimizer.warmup_steps: 20 is above steps (10)",
        "8: ratio.256: input should be a valid number, unable to parse string as a number, found 'many'",
        "10: phases.0: begins at 7 of 5",
        "11: phases.1.steps: 50 is above steps (10)",
        "12: phases.2.steps: input should be a valid integer, unable to parse string as an integer, "
        "found 'soon'",
    ]


def test_a_check_is_silent_where_what_it_reads_is_wrong(tmp_path):
    """No second complaint follows from the first one: lr is unknown, not 0; nobody knows what warmup is."""
    text = "name: a\nsteps: 10\noptimizer: {lr: -1, final_lr: 0.5, warmup_step: 20}\n"
    assert problems_of(tmp_path, text) == [
        "3: optimizer.lr: input should be greater than 0, found -1",
        "3: optimizer.warmup_step: unknown key 'warmup_step' (did you mean 'warmup_steps'?)",
    ]
    text = "name: a\nsteps: 10\noptimizer: fast\nphases: [{steps: 20}, 7]\n"
    assert len(problems_of(tmp_path, text)) == 2
    text = "name: a\nsteps: 10\noptimizer: {lr: 1}\nrules:\n  - rule: between\n    hihg: 3\n"
    assert problems_of(tmp_path, text) == ["6: rules.0.hihg: unknown key 'hihg' (did you mean 'high'?)"]


def test_checks_of_optional_sections_and_of_the_branches_of_a_union(tmp_path):
    text = """
name: a
steps: ten
optimizer: {lr: 1}
then: {lr: 0.1, final_lr: 0.5}
rules:
  - rule: above
    value: high
  - rule: outside
    missing: maybe
  - rule: sideways
"""
    *rest, unknown = problems_of(tmp_path, text)
    assert unknown == "11: rules.2: unknown rule 'sideways' (valid rules: above, between, outside)"
    assert [line.split(": ")[:2] for line in rest] == [
        ["3", "steps"],
        ["5", "then.final_lr"],
        ["8", "rules.0.value"],
        ["10", "rules.1.missing"],
    ]
    assert problems_of(tmp_path, text.replace("  - rule: sideways\n", ""))[-2:] == [
        "9: rules.1: outside needs low or high",
        "10: rules.1.missing: input should be 'drop' or 'keep', found 'maybe'",
    ]


def test_each_check_holds_outside_of_files_too():
    with pytest.raises(ValidationError, match=r"final_lr\n +0.5 is above lr"):
        Optimizer(lr=0.1, final_lr=0.5)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_are_finite_wherever_they_stand(tmp_path, value):
    text = f"name: a\nsteps: 1\noptimizer: {{lr: 1, final_lr: {value}}}\nratio: {{256: {value}}}\n"
    assert [line.split(", found")[0] for line in problems_of(tmp_path, text)] == [
        "3: optimizer.final_lr: input should be a finite number",
        "4: ratio.256: input should be a finite number",
    ]


def test_the_command_line_s_mistakes_come_with_the_file_s(tmp_path):
    text = "name: a\nsteps: 1\nsteps: -2\noptimizer: {lr: 1, final_lr: 2}\n"
    assert problems_of(tmp_path, text, "steps", "name.x=3", "optimizer.lr=[", "then={lr: -1}") == [
        "--set steps: expected key=value (for example --set optimizer.lr=1e-4)",
        f"--set name.x=3: name.x leads nowhere in {tmp_path}/recipe.yaml (see its keys)",
        "--set optimizer.lr=[: the value is not YAML: expected the node content, but found '<stream end>' "
        "(put it in quotes)",
        "--set then={lr: -1}: then.lr: input should be greater than 0, found -1",
        "3: steps is given twice (first on line 2)",
        "3: steps: input should be greater than 0, found -2",
        "4: optimizer.final_lr: 2.0 is above lr (1.0)",
    ]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("[5]", "sizes.0: must be a list of 2 values, found 5"),
        ("[[1, 2], {a: 1}]", "sizes.1: must be a list of 2 values, found {'a': 1}"),
        ("[[1, 2, 3]]", "sizes.0: list should have at most 2 items after validation, not 3, found [1, 2, 3]"),
    ],
)
def test_a_list_of_fixed_length_is_told_in_the_words_of_yaml(tmp_path, sizes, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, write(tmp_path, GOOD), [f"sizes={sizes}"])
    assert said in str(caught.value) and "tuple" not in str(caught.value).lower()


def test_missing_section_and_own_check(tmp_path):
    with pytest.raises(RecipeError, match="optimizer: is missing") as caught:
        load_recipe(Recipe, write(tmp_path, "name: ''\nsteps: 1\n"))
    assert "a run needs a name" in str(caught.value)


def test_duplicate_key_names_both_lines(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: steps is given twice \(first on line 2\)"):
        load_recipe(Recipe, write(tmp_path, "name: a\nsteps: 1\nsteps: 2\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("- 1\n- 2\n", "not a mapping"), ("", "name: is missing")],
)
def test_broken_files(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(Recipe, write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb\nc: 3\n", ":3", "could not find expected ':' while scanning a simple key of line 2"),
        (
            "a: [1,\n  2\n",
            ":3",
            "expected ',' or ']', but got '<stream end>' while parsing a flow sequence of line 1",
        ),
        ("a: 1\n\tb: 2\n", ":2", "found character '\\t' that cannot start any token while scanning"),
        ("a: 1\nb: c: 2\n", ":2", "mapping values are not allowed here"),
        ("a: \x00\n", "", "unacceptable character #x0000: special characters are not allowed"),
    ],
)
def test_what_is_no_yaml_is_told_in_one_line_at_its_place(tmp_path, text, line, words):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, path)
    message = str(caught.value)
    assert message.startswith(f"{path}{line}: not YAML: {words}") and "\n" not in message


@pytest.mark.parametrize(
    ("unknown", "said"),
    [
        ("optimiser", "did you mean 'optimizer'?"),
        ("stpes", "did you mean 'steps'?"),
        ("then_", "did you mean 'then'?"),
        ("keep", "valid keys: name, optimizer, phases, ratio, rules, sizes, steps, then"),
        ("output", "valid keys: name, optimizer, phases, ratio, rules, sizes, steps, then"),
    ],
)
def test_an_unknown_key_names_one_that_looks_alike_or_all(tmp_path, unknown, said):
    text = f"name: a\nsteps: 1\noptimizer: {{lr: 1}}\n{unknown}: 1\n"
    assert problems_of(tmp_path, text)[-1] == f"4: {unknown}: unknown key {unknown!r} ({said})"


def test_a_mistake_that_an_override_makes_elsewhere_is_told_at_the_override(tmp_path):
    text = "name: a\nsteps: 10\noptimizer: {lr: 1, warmup_steps: 5}\nphases: [{steps: 3, first: 7}]\n"
    assert problems_of(tmp_path, text, "optimizer.lr=2", "steps=4") == [
        "--set steps=4: optimizer.warmup_steps: 5 is above steps (4)",
        "4: phases.0: begins at 7 of 3",
    ]
    text = text.replace("first: 7", "first: 0")
    assert problems_of(tmp_path, text, "steps=4", "optimizer.lr=2", "optimizer.final_lr=7") == [
        "--set optimizer.final_lr=7: 7.0 is above lr (2.0)",
        "--set steps=4: optimizer.warmup_steps: 5 is above steps (4)",
    ]


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
    with pytest.raises(RecipeError, match=r"--set optimzer.lr=1: optimzer: unknown key 'optimzer'"):
        load_recipe(Recipe, path, ["optimzer.lr=1"])
    with pytest.raises(RecipeError, match="expected key=value"):
        load_recipe(Recipe, path, ["steps"])


def test_differing_keys_are_named():
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}) == ["a.b: 1 -> 3"]
    assert differing_keys({"rules": [{"min": 1}, {"max": 2}]}, {"rules": [{"min": 4}]}) == [
        "rules.0.min: 1 -> 4",
        "rules.1: {max} -> null",
    ]
    assert differing_keys({"a": {"b": {"c": 1}}, "d": True}, {"d": "x"}) == [
        "a: {b} -> null",
        'd: true -> "x"',
    ]
    (long,) = differing_keys({"a": "x" * 1000}, {"a": None})
    assert len(long) < 130


def test_a_folder_of_another_kind_of_recipe_is_told_as_such():
    there = {"input": {"path": ["shards"]}, "network": {"ch": 32}, "losses": {}, "output": "runs/a"}
    taken = taken_by_another("runs/a", there, {"sources": ["a"], "rules": [], "output": "runs/a"}, "Go.")
    assert str(taken) == (
        "runs/a was made by a recipe of another kind (its keys: input, losses, network, output). Go."
    )
    assert taken is not None and taken.exit_code == 78
    other = taken_by_another("runs/a", there, there | {"output": "runs/b"}, "Name another.")
    assert "belongs to another recipe" in str(other) and '\n  output: "runs/a" -> "runs/b"\n' in str(other)
    assert taken_by_another("runs/a", there, dict(there), "Name another.") is None


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
