"""`bitdance plan`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to plan with")
    return value


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A stage, such as configs/t2i/pt.yaml.")],
    gpus: Annotated[int, typer.Option(help="GPUs, all together.", min=1)],
    gpu: Annotated[str, typer.Option(help="Their kind, such as h100-80g.")] = "h100-80g",
    mfu: Annotated[float, typer.Option(help="Share of their peak FLOP/s that training reaches.")] = 0.4,
    price: Annotated[
        float | None,
        typer.Option(help="Dollars per GPU hour, if not the usual.", min=0, callback=_finite),
    ] = None,
    mtbf_hours: Annotated[
        float | None,
        typer.Option(
            help="Mean time between failures of the job; default: usual for its size.",
            min=0.01,
            callback=_finite,
        ),
    ] = None,
    stall_seconds: Annotated[
        float, typer.Option(help="That a save holds training up.", min=0.01, callback=_finite)
    ] = 30.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one value, for example --set data.ratio.512=1."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Memory, time, cost and disk of a stage before it is trained; needs no GPU and no weights.

    Exit code 0 where it fits, 78 where it does not.
    """
    from foundation.recipes import load_recipe
    from trainer.recipe import StageRecipe

    loaded = load_recipe(StageRecipe, recipe, overrides or ())
    import json

    from foundation.errors import ExitCode
    from foundation.progress import say
    from trainer.plan import estimate
    from trainer.plan.remedies import remedies
    from trainer.plan.text import plan_lines

    made = estimate.make_plan(
        loaded, recipe, gpus, gpu, estimate.Rates(mfu, price, mtbf_hours, stall_seconds)
    )
    fixes = [] if made.fits else remedies(made)
    if as_json:
        say(json.dumps({**estimate.as_json(made), "remedies": fixes}, indent=1))
    else:
        for line in plan_lines(made, fixes):
            say(line)
    if not made.fits:
        raise typer.Exit(ExitCode.RECIPE)
