"""`bitdance jobs`, `logs` and `cancel`: what the jobs are doing, told from Slurm and from their folders."""

from __future__ import annotations

import getpass
import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.status import read_status
from foundation.errors import DataError
from foundation.progress import say
from slurm.controller import ENDED, SlurmError, is_live, missing_commands, show, show_job, slurm
from slurm.history import JobFolder
from trainer.checkpoint_files import committed
from trainer.run_folder import RunFolder

COMMENT = "bitdance "  # what a job's comment begins with; its run's folder follows
TAIL_BYTES = 1 << 16
REASONS = {
    "Priority": "others come first",
    "Resources": "waits for nodes to become free",
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "the job before it has failed",
    "BeginTime": "was just put back into the queue",
    "JobHeldUser": "held; `scontrol release {job}` lets it go on",
    "launch_failed_requeued_held": "a node could not start it; `scontrol release {job}` lets it go on",
    "job_requeued_in_held_state": "held; `scontrol release {job}` lets it go on",
    "JobHeldAdmin": "held by the cluster's people",
    "ReqNodeNotAvail": "the nodes it may use are down or reserved",
    "PartitionTimeLimit": "asks for more time than its partition gives",
    "PartitionNodeLimit": "asks for more nodes than its partition gives",
    "BadConstraints": "no nodes are left that it may use",
}


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


def rows(roots: Iterable[Path]) -> list[Row]:
    """A row for each run and dataset below ``roots`` that was ever submitted, and for each of one's jobs."""
    found = {folder.path.resolve(): folder for root in roots for folder in job_folders(root)}
    for job in _own_jobs():
        output = Path(job["Comment"].removeprefix(COMMENT))
        for folder in (JobFolder.of_run(output), JobFolder.beside(output)):
            if folder.history.exists():
                found.setdefault(folder.path.resolve(), folder)
    return [_row(folder) for _, folder in sorted(found.items())]


def job_folders(root: Path) -> Iterator[JobFolder]:
    """Where jobs have left traces, at or below a folder."""
    for history in sorted({*root.glob("**/slurm/history.jsonl"), *root.glob("**/*.slurm/history.jsonl")}):
        yield JobFolder(history.parent)


def _own_jobs() -> list[dict[str, str]]:
    if missing_commands():
        return []
    mine = [job for job in show("job") if job["UserId"].partition("(")[0] == getpass.getuser()]
    return [job for job in mine if job.get("Comment", "").startswith(COMMENT)]


def _row(folder: JobFolder) -> Row:
    number = folder.last_job()
    job = _state_of(number, folder) if number is not None else {}
    waiting = job.get("JobState") == "PENDING"
    reason = job.get("Reason", "").partition(",")[0]
    last = (folder.lines("end") or [{"why": ""}])[-1]
    told = REASONS.get(reason, "see `man squeue`").format(job=number)
    why = f"{reason}: {told}" if waiting else str(last["why"])
    output = folder.path.parent if folder.path.name == "slurm" else folder.path.with_suffix("")
    common = {
        "path": str(output),
        "job": str(number or ""),
        "state": job.get("JobState", "?").lower(),
        "nodes": "" if waiting else job.get("NodeList", "").replace("(null)", ""),
        "restarts": job.get("Restarts", ""),
        "why": "" if job.get("JobState") == "RUNNING" else why,
    }
    return Row(**common, **(_of_run(output) if folder.path.name == "slurm" else _of_dataset(output)))


def _state_of(number: int, folder: JobFolder) -> dict[str, str]:
    """What Slurm knows of a job; where it has forgotten it, what sacct or the job's own history says."""
    if missing_commands():
        jobs: list[dict[str, str]] = []
    else:
        jobs = show("job", str(number))
    if len(jobs) > 1:
        return _of_array(jobs)
    if jobs:
        return jobs[0]
    return _accounted(number) or _remembered(number, folder)


def _of_array(jobs: list[dict[str, str]]) -> dict[str, str]:
    """An array's elements as one: how many are in which state."""
    counts = Counter[str]()
    for job in jobs:
        low, _, high = job.get("ArrayTaskId", "0").partition("%")[0].rpartition("-")
        waiting_together = job["JobState"] == "PENDING" and low.isdecimal() and high.isdecimal()
        counts[job["JobState"]] += int(high) - int(low) + 1 if waiting_together else 1
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    live = next((job for job in jobs if is_live(job)), jobs[0])
    restarts = str(sum(int(job["Restarts"]) for job in jobs))
    return live | {"JobState": states, "NodeList": "", "Restarts": restarts}


def _accounted(number: int) -> dict[str, str]:
    """A job as the accounting database knows it; nothing where there is none."""
    if shutil.which("sacct") is None:
        return {}
    try:
        text = slurm("sacct", "-n", "-P", "-X", "-j", str(number), "-o", "State,NodeList")
    except SlurmError:
        return {}
    line = next(iter(text.splitlines()), "")
    state, _, nodes = line.partition("|")
    return {"JobState": state.split(" ")[0], "NodeList": nodes} if state else {}


def _remembered(number: int, folder: JobFolder) -> dict[str, str]:
    ends = [line for line in folder.lines("end") if line["job"] == number]
    starts = [line for line in folder.lines("start") if line["job"] == number]
    if not ends:
        return {"JobState": "UNKNOWN", "Restarts": str(max(0, len(starts) - 1))}
    state = "COMPLETED" if ends[-1]["code"] == 0 else "ENDED"
    return {"JobState": state, "NodeList": ends[-1]["nodes"], "Restarts": str(ends[-1]["restart"])}


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


def _of_dataset(path: Path) -> dict[str, str]:
    try:
        status = read_status(path)
    except DataError:
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


def log_path(output: Path, rank: int | None) -> Path:
    """The log of a run's latest job, or of one of its ranks.

    Raises:
        DataError: there is none.
    """
    if rank is not None:
        path = RunFolder(output).logs / f"rank-{rank}.log"
    else:
        folder = folder_of(output)
        number = folder.last_job()
        parts = sorted(folder.path.glob(f"{number}_*.log"), key=lambda path: path.stat().st_mtime)
        path = parts[-1] if parts else folder.path / f"{number}.log"
    if not path.exists():
        raise DataError(f"{path} does not exist: the job has not started yet (`bitdance jobs` says why)")
    return path


def folder_of(output: Path) -> JobFolder:
    """Where the jobs of a run or dataset have left their traces.

    Raises:
        DataError: none was ever submitted.
    """
    for folder in (JobFolder.of_run(output), JobFolder.beside(output)):
        if folder.history.exists():
            return folder
    raise DataError(f"{output} was never submitted: it has no slurm/history.jsonl")


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


def cancel(output: Path, patience: float) -> None:
    """End the latest job of a run: a running stage saves first.

    Args:
        patience: seconds to wait for the save; the job saves and ends also if nobody waits.

    Raises:
        DataError: no job of the run is live.
    """
    folder = folder_of(output)
    number = folder.last_job()
    job = show_job(number) if number is not None else None
    if number is None or job is None or not is_live(job):
        raise DataError(f"{output}: no job of it is in the queue")
    folder.note("cancel", number)
    if job["JobState"] != "RUNNING" or folder.path.name != "slurm":
        slurm("scancel", str(number))
        say(f"job {number} is cancelled; what is done stays done")
        return
    slurm("scancel", "--batch", "--signal=USR1", str(number))
    say(f"job {number} ends its step, saves, and is cancelled then")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        job = show_job(number)
        if job is None or job["JobState"] in ENDED:
            newest = committed(RunFolder(output))
            saved = f"step {newest[0][0]} is saved" if newest else "it had not come to its first step"
            say(f"job {number} has ended: {saved}; submit the recipe again and it goes on from there")
            return
        time.sleep(1)
    say(f"job {number} is still saving after {patience:.0f} s; `bitdance jobs` tells when it has ended")
