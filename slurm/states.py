"""What has become of a job, as the controller, the accounting database or the job's own history knows it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping

from slurm.controller import SlurmError, is_live, slurm
from slurm.history import COMMENT, JobFolder

Known = Mapping[int, list[dict[str, str]]]  # as `all_jobs` returns it


def live_jobs(folder: JobFolder, known: Known) -> Known:
    """What is waiting or running for a run or dataset, also beside its latest job, by number."""
    numbers, comment = folder.all_jobs(), f"{COMMENT}{folder.path.resolve()}"
    found = {}
    for number, jobs in sorted(known.items()):
        # By its comment too: where sbatch got no answer, its job has no number here.
        ours = number in numbers or jobs[0].get("Comment") == comment
        if ours and (alive := [job for job in jobs if is_live(job)]):
            found[number] = alive
    return found


def job_in_focus(folder: JobFolder, known: Known) -> int | None:
    """The job that the news of a run or dataset are of: the first that is live, else the first that has
    failed, else the last.
    """
    for number in live_jobs(folder, known):
        return number
    numbers = folder.jobs()
    for number in numbers:
        if {job["JobState"] for job in known.get(number, [])} - {"COMPLETED", "CANCELLED"}:
            return number
    return numbers[-1] if numbers else None


def state_of(number: int, folder: JobFolder, known: Known) -> dict[str, str]:
    """What Slurm knows of a job; where it has forgotten it, what sacct or the job's own history says."""
    jobs = known.get(number, [])
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
    shown = next(filter(is_live, jobs), jobs[0])
    restarts = str(sum(int(job.get("Restarts", "0")) for job in jobs))
    return shown | {"JobState": states, "NodeList": "", "Restarts": restarts}


def _accounted(number: int) -> dict[str, str]:
    """A job as the accounting database knows it; nothing where there is none."""
    if shutil.which("sacct") is None:
        return {}
    try:
        text = slurm("sacct", "-n", "-P", "-X", "-j", str(number), "-o", "State,NodeList")
    except SlurmError:
        return {}
    rows = [line.partition("|") for line in text.splitlines()]  # of an array: one for each element
    jobs = [{"JobState": state.split(" ")[0], "NodeList": nodes} for state, _, nodes in rows]
    return jobs[0] if len(jobs) == 1 else _of_array(jobs) if jobs else {}


def _remembered(number: int, folder: JobFolder) -> dict[str, str]:
    ends = [line for line in folder.lines("end") if line["job"] == number]
    starts = [line for line in folder.lines("start") if line["job"] == number]
    if not ends or ends[-1].get("again"):
        return {"JobState": "UNKNOWN", "Restarts": str(max(0, len(starts) - 1))}
    cancelled = folder.is_cancelled(number)
    state = "COMPLETED" if ends[-1]["code"] == 0 else "CANCELLED" if cancelled else "FAILED"
    return {"JobState": state, "NodeList": ends[-1]["nodes"], "Restarts": str(ends[-1]["restart"])}
