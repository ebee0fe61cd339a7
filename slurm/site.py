"""The site file: what is particular about a cluster (see `slurm/site.example.env`)."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from foundation.errors import Problems, RecipeError
from foundation.sections import Section

SITE_FILE = Path("slurm/site.env")
_ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
_TIME = r"^(\d+-)?\d+(:\d+){0,2}$|^UNLIMITED$"


class Site(Section):
    """The names of the site file that are ours, in lower case; the file itself says what each means."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    gpu_kind: str | None = None
    cpus_per_task: Annotated[int, Field(gt=0)] = 1
    memory_per_node: str | None = None
    time_limit: Annotated[str, Field(pattern=_TIME)] | None = None
    save_seconds: Annotated[int, Field(gt=0)] = 600
    array_at_once: Annotated[int, Field(gt=0)] = 32
    sbatch_options: str = ""
    python: str | None = None
    network_interface: str | None = None
    shared_folders: str = ""
    dataset_cache: str | None = None
    srun_options: str = ""
    preflight_options: str = ""


@dataclass(frozen=True)
class SiteFile:
    """A site file as it was read.

    Attributes:
        path: where it stands; None where there is none.
        text: its lines, which each job's script runs.
    """

    site: Site
    path: Path | None = None
    text: str = ""


def read_site(path: Path | None) -> SiteFile:
    """Read a site file; without a path, the usual one, or nothing where that is missing.

    Raises:
        RecipeError: it isn't there, or everything that is wrong in it.
    """
    if path is None:
        if not SITE_FILE.exists():
            return SiteFile(Site())
        path = SITE_FILE
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"The site file {path} cannot be read ({error}); slurm/site.example.env is one to copy"
        ) from None
    problems, values, lines = Problems(), {}, {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _ASSIGNMENT.match(line)
        if match is None:
            continue  # a comment, or a line of the user's own for bash
        try:
            words = shlex.split(match[2], comments=True)
        except ValueError as error:
            problems.add(f"{path}:{number}", f"{match[1]}: {error}", "close the quotes")
            continue
        name = match[1].lower()
        if name not in Site.model_fields:
            near = difflib.get_close_matches(name, Site.model_fields, n=1)
            hint = f"did you mean {near[0].upper()}?" if near else "for a variable of your own: export"
            problems.add(f"{path}:{number}", f"unknown name {match[1]}", hint)
        elif words:
            values[name], lines[name] = " ".join(words), number
    try:
        site = Site.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0])
            problems.add(f"{path}:{lines[name]}", f"{name.upper()}={values[name]}: {detail['msg'].lower()}")
    problems.raise_if_any(RecipeError, f"The site file {path} cannot be used")
    return SiteFile(site, path, text)
