"""The site file: what is particular about a cluster (see `slurm/site.example.env`)."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import Field, ValidationError, field_validator

from foundation.errors import Problems, RecipeError
from foundation.sections import Section
from slurm.node_checks import add_limits
from slurm.script import options_of
from trainer.plan.gpus import GPUS

SITE_FILE = Path("slurm/site.env")
_ASSIGNMENT = re.compile(r"(\s*(?:export\s+)?)([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
_EXPANDED = re.compile(r"[$`]|(?:^|:)~")  # by bash, in a value
# What bash and `shlex` read alike: plain characters, or one pair of quotes around what means nothing in them.
_ALIKE = re.compile(
    r"""(?:[\w./:,@%+=^-]*|"[^"\\\x00-\x1f\x7f]*"|'[^'\x00-\x1f\x7f]*')([ \t]+\#.*)?[ \t]*""", re.ASCII
)
_TIME = r"^(\d+-)?\d+(:\d+){0,2}$|^UNLIMITED$"


class _Refuses(argparse.ArgumentParser):
    """One that does not end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


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
    data_partition: str | None = None
    data_options: str = ""
    python: str | None = None
    network_interface: str | None = None
    shared_folders: str = ""
    dataset_cache: str | None = None
    srun_options: str = ""
    preflight_options: str = ""

    @field_validator("gpus_per_node", "cpus_per_task", "save_seconds", "array_at_once", mode="before")
    @classmethod
    def _is_plain(cls, value: object) -> object:
        if isinstance(value, str) and not re.fullmatch(r"0|[1-9][0-9]*", value):
            raise ValueError("expected a whole number")
        return value

    def of_data(self, gpu: bool) -> Site:
        """What filter, finalize and tokenize take: a part of a node, not all of it as training does.

        Args:
            gpu: whether the job computes on one; it stays in the partition of the GPUs.
        """
        partition = self.partition if gpu else self.data_partition or self.partition
        changes = {"partition": partition, "sbatch_options": self.data_options, "memory_per_node": None}
        return self.model_copy(update=changes)

    @field_validator("sbatch_options", "data_options")
    @classmethod
    def _of_sbatch(cls, value: str) -> str:
        options_of(value)
        return value

    @field_validator("srun_options")
    @classmethod
    def _leaves_the_log(cls, value: str) -> str:
        if re.search(r"(^|\s)(-[oe]|--(output|error))", value):
            raise ValueError("expected no --output or --error: the job's log is read for bad nodes")
        return value

    @field_validator("gpu_kind")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in GPUS:
            raise ValueError(f"expected one of {', '.join(GPUS)}")
        return value

    @field_validator("preflight_options")
    @classmethod
    def _of_preflight(cls, value: str) -> str:
        parser = _Refuses(add_help=False)
        add_limits(parser)
        parser.parse_args(value.split())  # as bash will split it
        return value


READ_BY_SCRIPTS = ("network_interface", "srun_options", "preflight_options")  # and python
_NAMES = "|".join(name.upper() for name in Site.model_fields)
_CHANGED = re.compile(rf"(?<![\w$-])({_NAMES})(?=\+?=|\[)|\b(?:unset|read|for)\b.*(?<![\w$\{{])({_NAMES})\b")


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
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"The site file {path} cannot be read ({error}); slurm/site.example.env is one to copy"
        ) from None
    problems, values, lines = Problems(), {}, {}
    if "\r" in text:
        problems.add(str(path), "it has the line ends of Windows", f"sed -i 's/\\r$//' {path}")
    for number, line in enumerate([] if problems.lines else text.split("\n"), start=1):
        match = _ASSIGNMENT.match(line)
        before, shown, text_of_value = match.groups() if match else (" ", "", "")
        name = shown.lower()
        if before and name not in Site.model_fields:  # a comment, or a line of the user's own for bash
            if (changed := _CHANGED.search(line.partition("#")[0])) is not None:
                ours = changed[1] or changed[2]
                problem = f"{ours} is changed where `submit` does not see it"
                problems.add(f"{path}:{number}", problem, f"give it a line of its own: {ours}=VALUE")
            continue
        try:
            words = shlex.split(text_of_value, comments=True)
        except ValueError as error:
            problems.add(f"{path}:{number}", f"{shown}: {error}", "close the quotes")
            continue
        if name not in Site.model_fields:
            near = difflib.get_close_matches(name, Site.model_fields, n=1)
            hint = f"did you mean {near[0].upper()}?" if near else "for a variable of your own: export"
            problems.add(f"{path}:{number}", f"unknown name {shown}", hint)
        elif otherwise := _read_otherwise(before, text_of_value, words):
            problems.add(f"{path}:{number}", f"{shown}: {otherwise[0]}", otherwise[1])
        elif words:
            values[name], lines[name] = words[0], number
    try:
        site = Site.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0])
            said = detail["ctx"]["error"] if detail["type"] == "value_error" else detail["msg"].lower()
            problems.add(f"{path}:{lines[name]}", f"{name.upper()}={values[name]}: {said}")
    problems.raise_if_any(RecipeError, f"The site file {path} cannot be used")
    return SiteFile(site, path, text)


def _read_otherwise(before: str, value: str, words: Sequence[str]) -> tuple[str, str] | None:
    """Why bash would take an assignment for something else than `submit` does, and how to mend it."""
    if before:
        return "it does not stand at the beginning of its line", "leave out `export` and blanks before it"
    if len(words) > 1 or (words and value[0].isspace()):
        return "bash reads an unquoted blank as the end of a value", "put the value in quotes"
    if words and _EXPANDED.search(words[0]):
        return f"{words[0]} is not taken literally by bash", "write out what is meant, without $, ` and ~"
    if not _ALIKE.fullmatch(value):
        return f"{value} means something else to bash", "put it in quotes, all of it; a \\ has no place in it"
    return None


def lines_for_bash(file: SiteFile) -> str:
    """A site file as the scripts run it: its own lines, and then what `submit` has read in them.

    So the two agree, whatever the lines do, and nothing of the kind comes from the submitter's shell.
    """
    where = f"# from {file.path}\n{file.text.rstrip()}\n" if file.path else ""
    values = {"PYTHON": file.site.python or sys.executable}
    values |= {name.upper(): getattr(file.site, name) or "" for name in READ_BY_SCRIPTS}
    return where + "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
