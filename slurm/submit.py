"""`bitdance submit`: checks everything, fills the scripts in, submits them one after the other."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from foundation.errors import Problems, RecipeError
from foundation.progress import say
from slurm.checks import check_cluster, check_interpreter, check_plan, check_work
from slurm.controller import ControllerAway, SlurmError, all_jobs, patiently, slurm
from slurm.script import fill_in
from slurm.site import SiteFile, lines_for_bash
from slurm.states import live_jobs
from slurm.work import Asked, Work, open_recipe, work_of
from trainer.recipe import StageRecipe

TAKE_BACK_SECONDS = 60.0  # for which the controller may be away, when half a chain is to be cancelled
_EXPORTED = re.compile(r"^([ \t]*export[ \t]+\w+=).+$", re.MULTILINE)  # keys, maybe: not for a terminal


def gather(paths: Sequence[Path], overrides: Sequence[str], asked: Asked, file: SiteFile) -> list[Work]:
    """The jobs of some recipes, in order.

    Raises:
        RecipeError: a recipe is wrong, its run folder belongs to another one, or two stages do not follow
            upon each other.
    """
    works: list[Work] = []
    before: StageRecipe | None = None
    problems = Problems()
    for path in paths:
        recipe = open_recipe(path, overrides)
        source = (str(path), *(word for pair in overrides for word in ("--set", pair)))
        works += [replace(work, source=source) for work in work_of(recipe, asked, file)]
        if isinstance(recipe, StageRecipe):
            if before is not None and not _follows(recipe, before):
                problems.add(
                    f"{path}: model.init_from",
                    f"{recipe.model.init_from} is not the export of the stage before",
                    f"give {before.run}/export",
                )
            before = recipe
    problems.raise_if_any(RecipeError, "These recipes are no chain")
    return works


def _follows(recipe: StageRecipe, before: StageRecipe) -> bool:
    start = recipe.model.init_from
    return start is not None and Path(start).resolve() == (Path(before.run) / "export").resolve()


def check_all(works: Sequence[Work], asked: Asked, file: SiteFile) -> None:
    """Everything that can be known before submission.

    Raises:
        RecipeError: all that is wrong.
        ControllerAway: nothing else is, but the controller does not answer.
    """
    problems, nodes, away = Problems(), list[dict[str, str]](), None
    try:
        nodes = check_cluster(problems, file, asked.nodes, works)
    except ControllerAway as error:
        away = error
    check_interpreter(problems, file)
    made: set[Path] = set()
    for work in works:
        check_work(problems, work, made, file, nodes)
        if work.makes is not None:
            made.add(work.makes.parent)  # the run, or the dataset with its text tokenizer
    if away is None and not problems.lines:
        for work in works:
            check_plan(problems, work, file.site, nodes)
    if away is not None:
        if not problems.lines:
            raise away
        problems.add("Slurm", str(away))
    problems.raise_if_any(RecipeError, "Nothing was submitted")


def submit(works: Sequence[Work], file: SiteFile) -> list[int]:
    """Submit jobs so that each waits for the one before; their numbers. What is done already is left out.

    Raises:
        RecipeError: one of them is live already, or sbatch refuses; then none stays behind.
    """
    numbers: list[int] = []
    with ExitStack() as stack:
        for folder in dict.fromkeys(work.folder for work in works):
            stack.enter_context(folder.held())
        _refuse_second(works)
        todo = [work for work in works if not work.done]
        for work in works:
            if work.done:
                say(f"{work.title}: done already ({work.makes} is there)")
        try:
            for work in todo:
                work.capture()
                after = numbers[-1] if numbers else None
                numbers.append(_sbatch(work, file, after))
        except BaseException:  # also Ctrl-C: half a chain would block the next attempt
            if numbers:
                _take_back(numbers)
            raise
    return numbers


def _take_back(numbers: Sequence[int]) -> None:
    names = " ".join(map(str, numbers))
    try:
        patiently(TAKE_BACK_SECONDS, "scancel", *map(str, numbers))
        say(f"The jobs before it were cancelled: {names}")
    except SlurmError:
        say(f"The jobs before it could not be cancelled: when the controller answers, `scancel {names}`")


def _refuse_second(works: Sequence[Work]) -> None:
    problems, known = Problems(), all_jobs()
    for folder in dict.fromkeys(work.folder for work in works if not work.done):
        for number, jobs in live_jobs(folder, known).items():
            problems.add(
                str(folder.path.parent if folder.path.name == "slurm" else folder.path),
                f"job {number} is {jobs[0]['JobState'].lower()} on it",
                "follow it with `bitdance jobs`, or end it with `bitdance cancel`",
            )
    problems.raise_if_any(RecipeError, "Nothing was submitted")


def _sbatch(work: Work, file: SiteFile, after: int | None) -> int:
    script = filled(work, file, after)
    work.folder.path.mkdir(parents=True, exist_ok=True)
    path = work.folder.path / work.script
    path.unlink(missing_ok=True)  # an earlier one may be for all to read, or another person's
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as private:
        private.write(script)  # with what the site file exports: keys, maybe
    number = int(slurm("sbatch", "--parsable", str(path), *work.arguments).split(";")[0])
    work.folder.note("submitted", number, title=work.title, after=after, script=work.script)
    waits = f", after job {after}" if after is not None else ""
    say(f"job {number}: {work.title}{waits}")
    return number


def filled(work: Work, file: SiteFile, after: int | str | None) -> str:
    """The script of a job, as it is submitted."""
    options = dict(work.options)
    if after is not None:
        # A job that could never start, since the one before it has failed, must not wait for ever.
        options |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return fill_in(work.script, options, lines_for_bash(file))


def show_scripts(works: Sequence[Work], file: SiteFile) -> None:
    """What `submit` would do, on the terminal."""
    shown = replace(file, text=_EXPORTED.sub(r"\1...", file.text))
    for number, work in enumerate(works):
        say(f"# === {work.title}" + (" (done already: left out)" if work.done else ""))
        say(f"# sbatch {work.folder.path / work.script} {' '.join(work.arguments)}")
        say(filled(work, shown, "JOB-BEFORE" if number else None).rstrip())
