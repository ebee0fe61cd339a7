"""PNG files that say how they were made, so that the same command need not make them again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.recipes import Sampling
from foundation.files import atomic_write

NOTE = "bitdance"  # the PNG's text chunk


def picture_name(prompt: str, seed: int, number: int) -> str:
    """A file name that tells the prompt and is unique to it: letters, digits and dashes alone."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt.lower()).split()
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{'-'.join(words)[:48].strip('-') or 'picture'}-{digest}-s{seed}-{number}.png"


def picture_settings(prompt: str, size: tuple[int, int], sampling: Sampling, pictures: int) -> dict[str, Any]:
    """All that a picture depends on besides the weights (the size of its batch, for the noise)."""
    return {"prompt": prompt, "size": list(size), "pictures": pictures, **sampling.model_dump()}


def write_picture(path: Path, picture: Image.Image, settings: dict[str, Any]) -> None:
    """Write a PNG with the settings that it was made with in a text chunk."""
    note = PngInfo()
    note.add_itxt(NOTE, json.dumps(settings, sort_keys=True))
    with atomic_write(path, "wb") as file:
        picture.save(file, format="PNG", pnginfo=note)


def up_to_date(path: Path, settings: dict[str, Any], model: Path) -> bool:
    """Whether `path` was made with these settings after the model's weights were last written."""
    if not path.exists():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            picture.load()  # a text chunk may stand behind the pixels
            made_with = picture.info.get(NOTE)
    except (OSError, SyntaxError):  # what Pillow raises of a broken PNG: it is made again
        return False
    weights = [file.stat().st_mtime for file in model.glob("*.safetensors")]
    return (
        made_with == json.dumps(settings, sort_keys=True) and max(weights, default=0) < path.stat().st_mtime
    )
