"""PNG files that say how they were made, so that the same command need not make them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.recipes import Sampling
from foundation.errors import Problems, RecipeError
from foundation.files import atomic_write

NOTE = "bitdance"  # the PNG's text chunk


@dataclass(frozen=True)
class PictureRequest:
    """Pictures of one prompt, made in one batch.

    Attributes:
        prompt: what to paint.
        paths: the PNG files, one for each picture.
        settings: all that the pictures depend on (`picture_settings`), written into them.
    """

    prompt: str
    paths: list[Path]
    settings: dict[str, Any]


def picture_name(prompt: str, seed: int, number: int) -> str:
    """A file name that tells the prompt and is unique to it: letters, digits and dashes alone."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt.lower()).split()
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{'-'.join(words)[:48].strip('-') or 'picture'}-{digest}-s{seed}-{number}.png"


def picture_settings(
    prompt: str, size: tuple[int, int], sampling: Sampling, pictures: int, source: dict[str, Any]
) -> dict[str, Any]:
    """All that a picture depends on: the request (the size of its batch, for the noise) and `source_of`."""
    return {"prompt": prompt, "size": list(size), "pictures": pictures, **sampling.model_dump(), **source}


def source_of(model: Path, tokenizer: Path | None, device: str | None, dtype: str | None) -> dict[str, Any]:
    """What makes a picture: which weights, by the files that they are in, and in which arithmetic.

    Names, sizes and times of the files are looked at and not what is in them: a 14B model has 30 GB.
    """
    files = [
        (path.name, status.st_size, status.st_mtime_ns)
        for folder in (model, tokenizer)
        if folder is not None
        for path in sorted(folder.resolve().glob("*.safetensors"))
        for status in [path.stat()]
    ]
    weights = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {"model": str(model), "weights": weights, "device": device, "dtype": dtype}


def write_picture(path: Path, picture: Image.Image, settings: dict[str, Any]) -> None:
    """Write a PNG with the settings that it was made with in a text chunk."""
    note = PngInfo()
    note.add_itxt(NOTE, json.dumps(settings, sort_keys=True))
    with atomic_write(path, "wb") as file:
        picture.save(file, format="PNG", pnginfo=note)


def up_to_date(path: Path, settings: dict[str, Any]) -> bool:
    """Whether `path` is a whole picture that was made with these settings."""
    return _note(path, whole=True) == json.dumps(settings, sort_keys=True)


def refuse_foreign(paths: Iterable[Path]) -> None:
    """RecipeError, naming all of them, where something is there that `write_picture` has not written."""
    problems = Problems()
    for path in paths:
        if os.path.lexists(path) and _note(path) is None:
            problems.add(str(path), "is no picture that was made here", "move it, or name another --output")
    problems.raise_if_any(RecipeError, "Files that are there already would be overwritten")


def _note(path: Path, whole: bool = False) -> object:
    """The settings in a PNG that was made here, else None; with `whole` the pixels must be there too."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if whole:
                picture.load()
            return picture.info.get(NOTE)
    except (OSError, SyntaxError):  # what Pillow raises of a broken PNG
        return None
