"""The commands `bitdance data ...`. Everything heavy is imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

RecipePath = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, such as --set output=here."),
]
Dataset = Annotated[
    str, typer.Argument(help="The dataset: a folder, or an s3:// address.", show_default=False)
]


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write it.", show_default=False)],
) -> None:
    """Write the example photographs: image shards and metadata, as a real data set comes."""
    from data_pipeline.sample_photos.write import write_sample

    write_sample(folder)


@app.command("filter")
def filter_rows(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Keep the rows of metadata tables that pass a recipe's rules, and show what each rule drops."""
    from data_pipeline.metadata.filtering import run_filter
    from data_pipeline.metadata.recipe import FilterRecipe
    from foundation.recipes import load_recipe

    run_filter(load_recipe(FilterRecipe, recipe, overrides or ()))


@app.command()
def download(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Fetch the kept rows' pictures by img2dataset. Run it again to go on."""
    from data_pipeline.download.recipe import DownloadRecipe
    from data_pipeline.download.run import run_download
    from foundation.recipes import load_recipe

    run_download(load_recipe(DownloadRecipe, recipe, overrides or ()))


@app.command()
def tokenize(
    recipe: RecipePath,
    part: Annotated[
        str | None,
        typer.Option("--slice", metavar="I/N", help="Only tasks I, I+N, I+2N, ...; as an array job does."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Turn image shards into latent shards. Run it again to do what is missing."""
    from data_pipeline.tokenize.run import RecipeHere, parse_slice, run_tokenize
    from foundation.recipes import load_recipe

    run_tokenize(load_recipe(RecipeHere, recipe, overrides or ()), parse_slice(part))


@app.command()
def finalize(
    dataset: Dataset,
    memory: Annotated[str, typer.Option(help="Limit for the search for near-duplicates.")] = "4GB",
) -> None:
    """Finish a dataset whose tasks are all done: leave out near-duplicates, index, manifest."""
    from data_pipeline.finalize import finalize_dataset

    finalize_dataset(dataset, memory)


@app.command()
def status(dataset: Dataset) -> None:
    """Tell how far a dataset is: tasks done, under way and failed, samples a second, time left."""
    from data_pipeline.status import print_status, read_status

    print_status(read_status(dataset))


@app.command()
def retry(
    dataset: Dataset,
    without: Annotated[
        list[int] | None,
        typer.Option(
            "--give-up", metavar="N", help="Go on without task N, for good; may be given again.", min=0
        ),
    ] = None,
) -> None:
    """Forget the failures of a dataset's tasks, so that the next `tokenize` tries them again; or
    do without some."""
    from data_pipeline.status import clear_failures, give_up
    from foundation.progress import say

    if without:
        numbers = sorted(set(without))
        give_up(dataset, numbers)
        say(f"tasks given up: {len(numbers)}; run `bitdance data tokenize` with the recipe again")
        return
    say(f"failures cleared: {clear_failures(dataset)}; run `bitdance data tokenize` with the recipe again")


@app.command()
def verify(
    dataset: Dataset,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read and unpack records of every shard, too.")
    ] = False,
) -> None:
    """Check a finished dataset: every file's hash, counts, headers. Exit code 65 names each bad file."""
    from data_pipeline.verify import verify_dataset

    verify_dataset(dataset, deep)


@app.command()
def inspect(
    dataset: Dataset,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; DATASET/inspect.html if not given.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Pictures of each resolution class.")] = 24,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer, where it has moved since.", show_default=False),
    ] = None,
    filter_output: Annotated[
        Path | None,
        typer.Option("--filter", help="Output of `data filter`, if not the recipe's.", show_default=False),
    ] = None,
) -> None:
    """Show a finished dataset as one HTML page: decoded latents, captions, histograms, the funnel."""
    from data_pipeline.inspect.look import look_at, tokenizer_folder
    from data_pipeline.inspect.page import render_page
    from data_pipeline.latents import LatentDataset
    from data_pipeline.store import writing_to
    from foundation.errors import RecipeError
    from foundation.files import atomic_write
    from foundation.progress import say

    if output is None and "://" in dataset:
        raise RecipeError(f"{dataset} is not a folder: say where the page goes, by --output PAGE.html")
    latents = LatentDataset(dataset)
    folder = tokenizer_folder(latents, tokenizer)
    page = render_page(look_at(latents, samples, filter_output), folder)
    path = output or Path(dataset) / "inspect.html"
    with writing_to(path), atomic_write(path) as file:
        file.write(page)
    say(f"wrote {path} ({len(page) / 1e6:.2f} MB)")
