"""What comes after the last stage: its model in the published layout, and pictures of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from foundation.errors import Problems, RecipeError
from slurm.fitting import token_side
from slurm.history import JobFolder
from slurm.script import options_of
from slurm.site import Site
from slurm.work import Work, common_options
from trainer.recipe import StageRecipe
from trainer.run_folder import EXPORT_MANIFEST

DEFAULT_SIZE = "1024x1024"
MADE_OF = (
    "made-of.json"  # copy of the export's manifest beside the published folder; `export.sbatch` writes it
)


def publish_work(last: Work, published: Path, prompts: Sequence[str], size: str | None, site: Site) -> Work:
    """The job that publishes what the last stage exports.

    Args:
        published: the folder to write.
        prompts: pictures to make of the model.
        size: of the pictures, HEIGHTxWIDTH in pixels.

    Raises:
        RecipeError: the last job is no stage.
    """
    if not isinstance(last.recipe, StageRecipe) or last.makes is None:
        raise RecipeError("--publish needs a stage as the last recipe")
    export, folder, size = last.makes, JobFolder.beside(published), size or DEFAULT_SIZE
    pictures = [word for text in prompts for word in ("--prompt", text)]
    pictures += ["--size", size] if pictures else []
    options = common_options(site, published.name, folder) | {
        "gpus-per-node": "1" if site.gpus_per_node and prompts else None
    }
    return Work(
        title=f"export {published}",
        script="export.sbatch",
        arguments=(str(export), str(published), *pictures),
        options=options | options_of(site.sbatch_options),
        folder=folder,
        site=site,
        reads={"export": export},
        # Which pictures are there already, `bitdance generate` knows.
        makes=published if not prompts and _made_of(published, export) else None,
        check=partial(
            _check, published=published, recipe=last.recipe, export=export, prompts=prompts, size=size
        ),
    )


def _made_of(published: Path, export: Path) -> bool:
    """Whether a published folder was written from this export, as it is now."""
    try:
        note = (JobFolder.beside(published).path / MADE_OF).read_bytes()
        return published.is_dir() and note == (export / EXPORT_MANIFEST).read_bytes()
    except OSError:
        return False


def _check(
    problems: Problems, published: Path, recipe: StageRecipe, export: Path, prompts: Sequence[str], size: str
) -> None:
    if published.exists() and not _made_of(published, export):
        found = f"{published} is there already, and is not made of {export} as it is"
        problems.add(f"export {published}", found, "remove it, or name another folder")
    for number, text in enumerate(prompts, start=1):
        if not text.strip():
            problems.add(f"--prompt number {number}", "is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that Python cannot decode
            problems.add(f"--prompt number {number}", "is not UTF-8")
    size = size.lower()
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size, re.ASCII):
        problems.add(f"--size {size}", "expected HEIGHTxWIDTH in pixels", f"for example {DEFAULT_SIZE}")
    elif (side := recipe.model.p * (token_side(recipe) or 0)) and any(int(n) % side for n in size.split("x")):
        problems.add(f"--size {size}", f"sides of this model's pictures are multiples of {side} pixels")
