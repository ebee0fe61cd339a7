"""`bitdance train`: the commands of the trainer. Imports neither torch nor deepspeed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import ExitCode
from foundation.progress import say
from foundation.recipes import load_recipe, resolved_yaml
from trainer.launch import launch, started_as_rank
from trainer.lineage import lineage_lines
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder, claimed, find_run

app = typer.Typer(no_args_is_help=True)

RecipeArgument = Annotated[
    Path, typer.Argument(help="A recipe of a training stage, for example configs/t2i/pt.yaml.")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, for example --set optimizer.lr=2e-4."),
]


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the resolved recipe; do nothing.")
    ] = False,
    fork: Annotated[
        bool,
        typer.Option(
            "--fork", help="Where the run folder belongs to another recipe, start a new run beside it."
        ),
    ] = False,
    despite_no_progress: Annotated[
        bool, typer.Option("--despite-no-progress", help="Start even if the last starts came no further.")
    ] = False,
) -> None:
    """Train one stage: start it, go on with it, or find it finished; the run folder tells which.

    The ranks are started here (`world.processes`), or by torchrun or srun. SIGTERM, SIGUSR1 and Ctrl-C save
    at the end of the step. Exit codes: 0 finished, 75 saved and wants to go on, 65 bad data, 78 bad recipe,
    70 a bug.
    """
    loaded = load_recipe(StageRecipe, recipe, set_)
    if dry_run:
        _show(loaded, fork)
        return
    if started_as_rank(os.environ):
        from trainer.rank import join_run, leave

        leave(join_run(lambda: _unfinished(loaded, fork), despite_no_progress))
    found = _unfinished(loaded, fork)
    if found is None:
        return
    created = not Path(found.run).exists()
    with claimed(found) as run:
        code = launch(found, ["--despite-no-progress"] if despite_no_progress else [])
        if created and code in (ExitCode.RECIPE, ExitCode.DATA) and not run.began():
            shutil.rmtree(run.path)
    raise typer.Exit(code)


def _unfinished(recipe: StageRecipe, fork: bool) -> StageRecipe | None:
    """The recipe, pointed at its run folder; None where that is finished, which is said."""
    recipe = find_run(recipe, fork)
    finished = RunFolder(Path(recipe.run)).finished_at()
    if finished is None:
        return recipe
    say(f"{recipe.run} is finished: {finished} steps, the model is in {recipe.run}/export")
    return None


def _show(recipe: StageRecipe, fork: bool) -> None:
    """Print the resolved recipe, and then the refusal that a start would meet, if any."""
    try:
        recipe = find_run(recipe, fork)
    finally:
        say(resolved_yaml(recipe).rstrip())


@app.command()
def lineage(
    folder: Annotated[Path, typer.Argument(help="A run folder, or an export.")],
) -> None:
    """Print where a model came from: stage by stage, down to the first dataset."""
    for line in lineage_lines(folder):
        say(line)
