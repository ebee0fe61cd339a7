"""The command `bitdance tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def tokenizer() -> None:
    """Train the binary tokenizer."""


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML recipe, for example configs/quickstart/tokenizer.yaml.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value, for example --set seed=1."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it with all defaults, and stop.")
    ] = False,
) -> None:
    """Train a binary tokenizer on the pictures of image shards; goes on where it was interrupted."""
    from foundation.progress import say
    from foundation.recipes import load_recipe, resolved_yaml
    from trainer.tokenizer_training.recipe import TokenizerRecipe

    loaded = load_recipe(TokenizerRecipe, recipe, set_ or ())
    if dry_run:
        say(resolved_yaml(loaded).rstrip())
        return
    from trainer.tokenizer_training.finished import is_finished

    if is_finished(loaded):
        return
    from trainer.tokenizer_training.train import train_tokenizer

    raise typer.Exit(train_tokenizer(loaded))
