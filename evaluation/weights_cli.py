"""`bitdance import` and `bitdance export`: published weights in and out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import DataError, RecipeError
from foundation.files import atomic_write, commit_folder
from foundation.progress import say, track

if TYPE_CHECKING:
    from models.weights.kinds import Weights

app = typer.Typer(no_args_is_help=True)


@app.command("import")
def import_weights(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A folder, a .pt file, or hf:owner/name (one .pt of it: hf:owner/name/file.pt).",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; must not exist.")],
    patch: Annotated[
        int | None,
        typer.Option(help="Patch side p in tokens, where it is to be larger than the model's (4 -> 8)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new query embeddings that --patch adds.")] = 0,
) -> None:
    """Check published weights and write them as a folder that training and sampling start from.

    Text-to-image folders, class-conditional .pt files and tokenizers (ae_*.pt) are told apart by content.
    Only safetensors and plain tensors are read; nothing that comes with the weights is run.
    """
    with _user_errors():
        from models.weights.grow import grow_patch
        from models.weights.kinds import describe, open_weights, write_folder
        from models.weights.source import ModelSource
        from models.weights.sources import locate

        _refuse_existing(destination)
        weights = open_weights(locate(source))
        if patch is not None:
            if not isinstance(weights, ModelSource):
                raise RecipeError(f"--patch is for text-to-image models; {source} is a {describe(weights)}")
            weights = grow_patch(weights, patch, seed)
        say(describe(weights))
        with _new_folder(destination) as partial:
            write_folder(_with_progress(weights), partial)
    say(f"written to {destination}")


@app.command("export")
def export_weights(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A folder of `bitdance import` or of training.")
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="What to write; must not exist. A folder for text-to-image models, else a .pt file.",
        ),
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the binary tokenizer, where SRC is a model without one."),
    ] = None,
) -> None:
    """Check weights and write them in the form in which the models are published."""
    with _user_errors():
        from models.weights.kinds import (
            describe,
            open_weights,
            with_frozen_tokenizer,
            write_file,
            write_folder,
        )
        from models.weights.source import ModelSource, with_tokenizer
        from models.weights.sources import locate

        _refuse_existing(destination)
        weights = open_weights(locate(source))
        say(describe(weights))
        if isinstance(weights, ModelSource):
            complete = with_tokenizer(weights, tokenizer)
            with _new_folder(destination) as partial:
                write_folder(_with_progress(complete), partial)
        else:
            if destination.suffix != ".pt":
                raise RecipeError(f"{destination}: a {describe(weights)} is published as a .pt; name one")
            complete_file = with_frozen_tokenizer(weights, tokenizer)
            with atomic_write(destination, "wb") as file:
                write_file(complete_file, file)
    say(f"written to {destination}")


def _with_progress(weights: Weights) -> Weights:
    """The same weights; a pass over those of a text-to-image model shows how far it is."""
    from models.weights.source import ModelSource

    if not isinstance(weights, ModelSource):
        return weights
    tensors, count = weights.tensors, len(weights.specs)
    return dataclasses.replace(weights, tensors=lambda: iter(track(tensors(), "weights", total=count)))


def _refuse_existing(destination: Path) -> None:
    if destination.exists():
        raise RecipeError(f"{destination} exists already; remove it, or name another place")


@contextmanager
def _user_errors() -> Iterator[None]:
    """What models/ says about weights is for the user; a full disk or a forbidden place is too."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A folder beside ``final`` that becomes it at the end, and is removed where that isn't reached."""
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        commit_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
