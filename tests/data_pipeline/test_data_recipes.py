"""The recipes of data follow each other: from a filter's tables to the latents that each stage reads."""

import re
from pathlib import Path

import pytest

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.recipes import load_recipe
from models.layout import PUBLISHED_SIZES
from trainer.recipe import StageRecipe

CONFIGS = Path("configs")
STAGES = sorted((CONFIGS / "t2i").rglob("*.yaml"))
SD2 = CONFIGS / "data/filters/sd2.yaml"
DATA = sorted((CONFIGS / "data").rglob("*.yaml"))


def made_by(model, pattern, made):
    """Path and recipe of the one recipe in configs/data/ whose output is the folder `made`."""
    recipes = {path: load_recipe(model, path) for path in sorted((CONFIGS / "data").glob(pattern))}
    (found,) = [(path, recipe) for path, recipe in recipes.items() if recipe.output == made]
    return found


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_each_stage_is_a_walk_from_files_that_exist(path):
    """Train <- tokenize <- download <- filter: what one reads, another one of them writes."""
    stage, text = load_recipe(StageRecipe, path), path.read_text()
    place, tokenize = made_by(TokenizeRecipe, "*/tokenize.yaml", stage.data.latents)
    assert str(place) in text  # where its reader learns what comes before
    assert tokenize.tokenizer == stage.tokenizer
    classes = {c.resolution: set(c.buckets) for c in tokenize.classes}
    assert stage.data.ratio.keys() <= classes.keys()
    for resolution, buckets in classes.items():
        halved = {(2 * height, 2 * width) for height, width in buckets}
        assert (
            halved == set(PUBLISHED_SIZES[512])
            if resolution == 256
            else buckets == set(PUBLISHED_SIZES[resolution])
        )
    if tokenize.input.kind == "folder":
        return  # somebody's own pictures
    (tars,) = tokenize.input.path
    place_of_images, download = made_by(DownloadRecipe, "*/download.yaml", tars.removesuffix("/shards/*.tar"))
    assert str(place_of_images) in place.read_text()
    kept = download.rows.removesuffix("/kept.parquet")
    place_of_rows, _ = made_by(FilterRecipe, "filters/*.yaml", kept)
    assert str(place_of_rows) in place_of_images.read_text()


def test_every_recipe_of_data_is_part_of_a_walk():
    """Filters besides: there are more published choices than stages."""
    told = "".join(path.read_text() for path in (*STAGES, *DATA))
    for path in DATA:
        if path.parent.name != "filters":
            assert told.count(str(path)) > path.read_text().count(str(path)), path


@pytest.mark.parametrize("path", [path for path in DATA if path.parent.name in ("pt", "ct", "sft")], ids=str)
def test_the_top_of_a_large_job_says_what_it_costs_and_what_comes_before(path):
    top, _, _ = path.read_text().partition("\n\n")
    for word in ("Hardware", "Hours", "Disk", "Expect", "Before", "Start"):
        assert f"\n# {word:10}" in top
    for named in re.findall(r"configs/\S+\.yaml", top):
        assert Path(named).is_file(), named
    assert f"bitdance data {path.stem} {path}" in top


def test_the_cost_of_the_published_filters_is_what_was_measured():
    """The rates at the top of a filter's recipe are those of docs/data.md's table, by the same benchmark."""
    figures = Path("docs/data.md").read_text().partition("## Figures")[2]
    measured = [line for line in figures.splitlines() if "metadata_filter.py" in line]
    told = re.findall(r"[\d.]+ million rows/s|[\d,]+(?=\s+(?:#\s+)?rows of what is left)", SD2.read_text())
    assert len(told) == 2 and all(any(rate in line for line in measured) for rate in told)
    rows, seconds, minutes = re.search(
        r"\((\d+) million rows\) takes (\d+) s, and at most (\d+) minutes", SD2.read_text()
    ).groups()
    passed, by_one_core = float(told[0].split()[0]), float(told[1].replace(",", ""))
    assert round(int(rows) / passed) == int(seconds)
    assert int(minutes) - 1 < int(rows) * 1e6 / by_one_core / 2 / 60 <= int(minutes), "of two cores"
