"""`bitdance submit`, `jobs`, `logs` and `cancel`. Imports neither torch nor anything that does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import RecipeError

app = typer.Typer()


@app.command()
def submit(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Of a stage, `data tokenize` or `data filter`.")
    ],
    nodes: Annotated[str, typer.Option(help="For stages: N, or N-M to take what is free.")] = "1",
    slices: Annotated[int, typer.Option(help="For `data tokenize`: elements of the array.", min=1)] = 16,
    chain: Annotated[
        bool, typer.Option("--chain", help="Several recipes, each after the one before has succeeded.")
    ] = False,
    publish: Annotated[
        Path | None, typer.Option(help="After the last stage: write its model here, as models are published.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="With --publish: pictures to make of it.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of the pictures, HEIGHTxWIDTH.", show_default="1024x1024")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="The site file.", show_default="slurm/site.env, if it is there")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scripts as they would be submitted; do nothing.")
    ] = False,
) -> None:
    """Submit recipes to Slurm; what can go wrong is looked for first.

    A job goes on by itself after time limits, preemption and lost nodes. Its log, its script and what became
    of it are in RUN/slurm (for data: beside the output, in OUTPUT.slurm).
    """
    from slurm.publishing import publish_work
    from slurm.site import read_site
    from slurm.submit import check_all, gather, show_scripts
    from slurm.submit import submit as run
    from slurm.work import Asked

    if len(recipes) > 1 and not chain:
        raise RecipeError(f"{len(recipes)} recipes: add --chain to have each start after the one before")
    if prompt and publish is None:
        raise RecipeError("--prompt needs --publish FOLDER, the model that the pictures are made of")
    if size and not prompt:
        raise RecipeError("--size needs --prompt TEXT, a picture to make in that size")
    file, asked = read_site(site), Asked(nodes, slices)
    works = gather(recipes, set_ or (), asked, file)
    if publish is not None:
        works.append(publish_work(works[-1], publish, prompt or (), size, file.site))
    if dry_run:
        show_scripts(works, file)
        return
    check_all(works, asked, file)
    run(works, file)


@app.command()
def jobs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Where to look for runs.", show_default="runs, data")
    ] = None,
) -> None:
    """Tell what was submitted: state, nodes, restarts, step, loss, time left, last save, why it waits."""
    from slurm.controller import ControllerAway, all_jobs, missing_commands
    from slurm.follow import rows, show_rows

    known, away = {}, None
    try:
        known = {} if missing_commands() else all_jobs()
    except ControllerAway as error:
        away = error
    show_rows(rows(folders or [Path("runs"), Path("data")], known))
    if away is not None:  # what the folders tell is shown all the same
        raise away


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help="A run folder, or a dataset.")],
    rank: Annotated[int | None, typer.Option(help="Of one rank, over all starts.", min=0)] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="From the end.", min=0)] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows; Ctrl-C ends.")] = False,
) -> None:
    """Print the log of a run's latest job."""
    from slurm.follow import follow as print_log
    from slurm.follow import log_path

    print_log(log_path(run, rank), lines, follow)


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="A run folder, or a dataset.")],
    patience: Annotated[float, typer.Option(help="Seconds to wait for the save.", min=0)] = 600,
) -> None:
    """End a run's job; a stage in training saves first. Jobs that wait for it are cancelled by Slurm."""
    from slurm.follow import cancel as end

    end(run, patience)
