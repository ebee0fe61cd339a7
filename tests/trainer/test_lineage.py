"""What a run began with: recorded by its first start, and asked for again where a later one reads it."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from small_stage import make_inputs, write_recipe

from data_pipeline.latents import LatentDataset
from foundation.errors import DataError
from foundation.recipes import load_recipe
from models.weights import write_source
from trainer.checkpoint_files import CheckpointManifest, commit, partial_folder
from trainer.lineage import lineage_lines, lineage_of
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder, create_run, take_start
from trainer.stage_start import open_start, start_files

FILES = {
    "config.json",
    "model.safetensors",
    "projector.safetensors",
    "vision_head.safetensors",
    "vision_head_config.json",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def base(inputs: Path, tmp_path: Path) -> Path:
    """A model as `bitdance import` writes it: without a record of ours."""
    recipe = load_recipe(StageRecipe, write_recipe(inputs))
    folder = tmp_path / "base"
    write_source(replace(open_start(recipe), tokenizer_folder=Path(recipe.tokenizer)), folder)
    return folder


def begin(inputs: Path, base: Path, lora: bool) -> StageRecipe:
    """The recipe of a run that a first start has recorded."""
    model: dict[str, object] = {"p": 4, "init_from": str(base)}
    if lora:
        model["lora"] = {"rank": 2}
    path = write_recipe(inputs, run=str(base.parent / "run"), model=model)
    recipe = load_recipe(StageRecipe, path)
    create_run(recipe)
    lineage(recipe)
    return recipe


def lineage(recipe: StageRecipe) -> dict:
    dataset = LatentDataset(recipe.data.latents)
    return lineage_of(RunFolder(Path(recipe.run)), recipe, dataset.manifest, start_files(recipe))


def put_another(file: Path) -> str:
    """Other weights under the same path and of the same size; returns their hash."""
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    return sha256(file.read_bytes()).hexdigest()


def test_a_run_records_the_weights_that_it_begins_with(inputs: Path, base: Path) -> None:
    recipe = begin(inputs, base, lora=False)
    recorded = json.loads((Path(recipe.run) / "lineage.json").read_text())["parent"]
    assert recorded["from"] == str(base) and recorded["files"].keys() == FILES
    shown = "\n".join(lineage_lines(Path(recipe.run)))
    for name, found in recorded["files"].items():
        assert found == sha256((base / name).read_bytes()).hexdigest()
        assert f"{name}, {found[:12]}" in shown
    assert f"from {base}, which has no record of ours" in shown


def test_adapters_refuse_another_base_under_the_same_path(inputs: Path, base: Path) -> None:
    recipe, file = begin(inputs, base, lora=True), base / "model.safetensors"
    file.write_bytes(file.read_bytes())  # touched, as by a copy
    before = lineage(recipe)["parent"]["files"]["model.safetensors"]
    found = put_another(file)
    (base / "projector.safetensors").unlink()
    with pytest.raises(DataError) as error:
        lineage(recipe)
    said = str(error.value)
    assert f"{file}: its hash is {found[:12]}, the run began with {before[:12]}" in said
    assert f"{base / 'projector.safetensors'}: is missing" in said
    assert "vision_head" not in said and recipe.run in said and "another `run`" in said


def test_weights_that_are_not_read_again_may_change(inputs: Path, base: Path) -> None:
    """Without adapters a checkpoint has all; before there is one, they are read again."""
    recipe = begin(inputs, base, lora=False)
    put_another(base / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors: its hash is"):
        lineage(recipe)
    run = RunFolder(Path(recipe.run))
    start = take_start(run, 0, ranks=1)
    partial = partial_folder(run, 2, start)
    partial.mkdir()
    commit(run, partial, CheckpointManifest(2, start, "0" * 64, {}, {}))
    assert lineage(recipe)["parent"]["from"] == str(base)


def test_other_latents_are_refused_with_all_else_that_has_changed(inputs: Path, base: Path) -> None:
    recipe = begin(inputs, base, lora=True)
    path = Path(recipe.run) / "lineage.json"
    values = json.loads(path.read_text())
    values["dataset"]["manifest_sha256"] = "0" * 64
    path.write_text(json.dumps(values))
    put_another(base / "model.safetensors")
    with pytest.raises(DataError, match=r"(?s)2 problems.*latents: .*000000000000.*model\.safetensors"):
        lineage(recipe)


def test_a_run_of_an_earlier_version_has_no_hashes_to_compare(inputs: Path, base: Path) -> None:
    recipe = begin(inputs, base, lora=True)
    path = Path(recipe.run) / "lineage.json"
    values = json.loads(path.read_text())
    del values["parent"]["files"]
    path.write_text(json.dumps(values))
    assert lineage(recipe) == values
    assert f"  from {base}, which has no record of ours" in lineage_lines(Path(recipe.run))
