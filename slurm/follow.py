"""`bitdance jobs`, `logs` and `cancel`: what the jobs are doing, told from Slurm and from their folders."""

from __future__ import annotations

import getpass
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.status import read_status
from foundation.errors import DataError, UserError
from foundation.progress import say
from slurm.controller import ControllerAway, SlurmError, all_jobs, is_live, live, slurm
from slurm.history import COMMENT, JobFolder
from slurm.reasons import why
from slurm.states import Known, job_in_focus, live_jobs, state_of
from trainer.checkpoint_files import committed
from trainer.run_folder import RunFolder

TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Row:
    """One run or dataset and its job, ready to be shown; all in words."""

    path: str
    job: str
    state: str
    nodes: str
    restarts: str
    progress: str
    loss: str = ""
    left: str = ""
    checkpoint: str = ""
    why: str = ""


def rows(roots: Iterable[Path], known: Known) -> list[Row]:
    """A row for each run and dataset that was submitted: those below ``roots``, and those of one's jobs.

    Args:
        known: what the controller tells of jobs.
    """
    found = {folder.path.resolve(): folder for root in roots for folder in job_folders(root)}
    mine = (
        job for jobs in known.values() for job in jobs if job["UserId"].startswith(f"{getpass.getuser()}(")
    )
    for job in mine:
        _, ours, path = job.get("Comment", "").partition(COMMENT)
        folder = JobFolder(Path(path))
        if ours and folder.history.exists():
            found.setdefault(folder.path.resolve(), folder)
    return [_row(folder, known) for _, folder in sorted(found.items())]


def job_folders(root: Path) -> Iterator[JobFolder]:
    """Where jobs have left traces, at or below a folder."""
    for history in sorted({*root.glob("**/slurm/history.jsonl"), *root.glob("**/*.slurm/history.jsonl")}):
        yield JobFolder(history.parent)


def _row(folder: JobFolder, known: Known) -> Row:
    number = job_in_focus(folder, known)
    job = state_of(number, folder, known) if number is not None else {"JobState": "UNKNOWN"}
    jobs = known.get(number or 0) or [job]
    output = output_of(folder)
    found = _of_run(Path(output)) if folder.path.name == "slurm" else _of_dataset(output)
    if not any(map(is_live, jobs)):
        found.pop("left", None)
    return Row(
        path=output,
        job=str(number or ""),
        state=job["JobState"].lower(),
        nodes="" if job["JobState"] == "PENDING" else job.get("NodeList", "").replace("(null)", ""),
        restarts=job.get("Restarts", ""),
        why=why(number, folder, jobs) if number is not None else "",
        **found,
    )


def output_of(folder: JobFolder) -> str:
    """The run or dataset whose jobs leave their traces in a folder."""
    if folder.path.name == "slurm":
        return str(folder.path.parent)
    try:
        output = str(yaml.safe_load((folder.path / "recipe.yaml").read_text())["output"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        output = ""  # it was submitted without a recipe
    return output if "://" in output else str(folder.path.with_suffix(""))


def _of_run(path: Path) -> dict[str, str]:
    run = RunFolder(path)
    try:
        steps = yaml.safe_load(run.recipe.read_text())["steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        steps = "?"
    line = last_line(run.metrics)
    newest = committed(run)
    saved = ""
    if newest:
        step, folder = newest[0]
        saved = f"step {step}, {duration(time.time() - folder.stat().st_mtime)} ago"
    loss = line.get("loss")
    return {
        "progress": f"{line['step'] + 1}/{steps}" if line else f"0/{steps}",
        "loss": f"{loss:.4f}" if loss is not None else "",
        "left": duration(line["eta_seconds"]) if line else "",
        "checkpoint": saved,
    }


def _of_dataset(output: str) -> dict[str, str]:
    try:
        status = read_status(output)
    except UserError:  # not begun yet, or in a store that does not answer
        return {"progress": ""}
    left = duration(status.seconds_left) if status.seconds_left else ""
    return {"progress": f"{status.done}/{status.tasks} tasks", "left": left}


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a .jsonl file, {} where there is none; reads its end only."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 05 min`, `4 min 10 s`, `8 s`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def show_rows(found: list[Row]) -> None:
    """A table; in a file or pipe one of any width."""
    from rich.console import Console
    from rich.table import Table

    if not found:
        say("No jobs here: nothing below was ever submitted, and no job of yours is in the queue")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "job", "state", "nodes", "restarts", "step", "loss", "left", "saved", "why"):
        table.add_column(heading, overflow="fold")
    for row in found:
        table.add_row(*vars(row).values())
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    console.print(table)


def log_path(output: str | Path, rank: int | None) -> Path:
    """The log of a run's latest job, or of one of its ranks.

    Args:
        output: a run folder or a dataset, which may be in a store.

    Raises:
        DataError: there is none.
    """
    folder = folder_of(output)
    if rank is None:
        numbers = folder.jobs()
        names = [name for number in numbers for name in (f"{number}.log", f"{number}_*.log")]
        logs = [path for name in names for path in folder.path.glob(name)]
        if logs:
            return max(logs, key=lambda path: path.stat().st_mtime)
        where = f"{folder.path} holds no log of job {' or '.join(map(str, numbers))}"
    elif folder.path.name != "slurm":
        raise DataError(f"{output}: a data job has no ranks; leave --rank out")
    else:
        path = RunFolder(Path(output)).logs / f"rank-{rank}.log"
        if path.exists():
            return path
        where = f"{path} does not exist"
        if others := sorted(int(log.stem.removeprefix("rank-")) for log in path.parent.glob("rank-*.log")):
            raise DataError(f"{where}: the run's ranks are {', '.join(map(str, others))}")
    raise DataError(
        f"{where}: the job has not started yet (`bitdance jobs` says why), or was given to plain sbatch, and "
        "its log is where its script says"
    )


def folder_of(output: str | Path) -> JobFolder:
    """Where the jobs of a run or dataset have left their traces.

    Raises:
        DataError: none was ever submitted.
    """
    folders = JobFolder.of_run(output), JobFolder.beside(output)
    for folder in folders:
        if folder.jobs():
            return folder
    places = " nor ".join(str(folder.history) for folder in folders[-1 if "://" in str(output) else 0 :])
    raise DataError(f"{output} was never submitted from here: there is no {places}")


def follow(path: Path, lines: int, on: bool) -> None:
    """Print the end of a file, and what is added to it, until interrupted."""
    with open(path, errors="replace") as file:
        for line in deque(file, maxlen=lines):
            say(line.rstrip("\n"))
        while on:
            line = file.readline()
            if line:
                say(line.rstrip("\n"))
            else:
                time.sleep(0.5)


def cancel(output: str | Path, patience: float) -> None:
    """End what is live of a run's or dataset's jobs: a running stage saves first.

    Args:
        patience: seconds to wait for the save; the job saves and ends also if nobody waits.

    Raises:
        DataError: no job of the run is live.
        SlurmError: the controller refuses or is away; nothing is cancelled then.
    """
    folder = folder_of(output)
    found = live_jobs(folder, all_jobs())
    if not found:
        raise DataError(f"{output}: no job of it is in the queue")
    for number, jobs in found.items():
        folder.note("cancel", number)
        saves = jobs[0]["JobState"] == "RUNNING" and folder.path.name == "slurm"
        try:
            slurm("scancel", *(("--batch", "--signal=USR1") if saves else ()), str(number))
        except SlurmError:
            folder.note("cancel", number, withdrawn=True)
            raise
        if saves:
            _wait_for_the_end(number, RunFolder(Path(output)), patience)
        else:
            say(f"job {number} is cancelled; what is done stays done")


def _wait_for_the_end(number: int, run: RunFolder, patience: float) -> None:
    say(f"job {number} ends its step, saves, and is cancelled then")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not _is_known_live(number):
            newest = committed(run)
            saved = f"step {newest[0][0]} is saved" if newest else "it had not come to its first step"
            say(f"job {number} has ended: {saved}; submit the recipe again and it goes on from there")
            return
        time.sleep(1)
    say(f"job {number} is still saving after {patience:.0f} s; `bitdance jobs` tells when it has ended")


def _is_known_live(number: int) -> bool:
    try:
        return bool(live(number))
    except ControllerAway:
        return True  # the save goes on without it
