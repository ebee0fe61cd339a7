"""`bitdance import` and `bitdance export`: published weights in and out."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer

from foundation.errors import DataError, RecipeError
from foundation.files import atomic_write, commit_folder
from foundation.partials import PARTIAL_SUFFIX, partial_path, sweep_abandoned
from foundation.progress import say, track

TICK = 16 << 20  # bytes

app = typer.Typer(no_args_is_help=True)


@app.command("import")
def import_weights(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A folder, a .pt file, a tokenizer's .safetensors, or hf:owner/name (one such file of it: "
            "hf:owner/name/file.pt).",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; must not exist.")],
    patch: Annotated[
        int | None,
        typer.Option(help="Patch side p in tokens, where it is to be larger than the model's (4 -> 8)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new query embeddings that --patch adds.")] = 0,
    heads: Annotated[
        int | None,
        typer.Option(
            help="Attention heads of a class-conditional .pt, where they are not 64 wide as in all published "
            "ones: no tensor tells. Files of `bitdance export` do.",
            min=1,
        ),
    ] = None,
) -> None:
    """Check published weights and write them as a folder that training and sampling start from.

    Text-to-image folders, class-conditional .pt files and tokenizers (ae_*.pt) are told apart by content.
    Only safetensors and plain tensors are read; nothing that comes with the weights is run.
    """
    with _user_errors():
        from models.layout import tiles_published_size
        from models.weights.grow import grow_patch
        from models.weights.kinds import describe, open_weights, write_folder
        from models.weights.source import ModelSource
        from models.weights.sources import locate

        _refuse_existing(destination)
        weights = open_weights(locate(source), heads)
        if patch is not None:
            if not isinstance(weights, ModelSource):
                raise RecipeError(f"--patch is for text-to-image models; {source} is a {describe(weights)}")
            weights = grow_patch(weights, patch, seed)
            side = patch * weights.config.tokenizer_downsample
            if not tiles_published_size(side):
                say(f"--patch {patch}: sides in multiples of {side} px, unlike those of any published size")
        say(describe(weights))
        with _new_folder(destination) as partial:
            write_folder(weights, partial, _shown)
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
            bytes_of,
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
                write_folder(complete, partial, _shown)
        else:
            if destination.suffix != ".pt":
                raise RecipeError(
                    f"{destination}: expected a name that ends in .pt, which is the published form of what "
                    f"{source} holds (a {describe(weights)})"
                )
            complete_file = with_frozen_tokenizer(weights, tokenizer)
            with atomic_write(destination, "wb") as file:
                shown = _ShownFile(file, bytes_of(complete_file))
                write_file(complete_file, cast(IO[bytes], shown))  # torch.save writes and flushes
    say(f"written to {destination}")


def _shown(tensors: Iterable[Any], total: int) -> Iterator[Any]:
    return track(tensors, "weights", total)


class _ShownFile:
    """A file to write to, which shows how many of the `expected` bytes are written."""

    def __init__(self, file: IO[bytes], expected: int) -> None:
        self._file, self._written, self._shown = file, 0, 0
        self._ticks = track(range(expected // TICK + 1), "writing, in 16 MiB")

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self._written += count
        while self._shown <= self._written // TICK:
            next(self._ticks, None)
            self._shown += 1
        return count

    def flush(self) -> None:
        self._file.flush()


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):  # a link that leads nowhere is in the way, too
        raise RecipeError(f"{destination} exists already; remove it, or name another place")


@contextmanager
def _user_errors() -> Iterator[None]:
    """What models/ says about weights is for the user; a full disk or a forbidden place is too."""
    from models.checks import WrongRequest

    try:
        yield
    except WrongRequest as error:
        raise RecipeError(str(error)) from error
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A folder beside ``final`` that becomes it at the end, and is removed where that isn't reached."""
    sweep_abandoned(final.parent.glob(f".{glob.escape(final.name)}.*{PARTIAL_SUFFIX}"))
    partial = partial_path(final)  # nobody else's, whoever writes to the same place
    partial.mkdir(parents=True)
    try:
        yield partial
        commit_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
