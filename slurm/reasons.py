"""Why a job waits, or has ended as it has, in words."""

from __future__ import annotations

from collections.abc import Sequence

from foundation.errors import ExitCode
from slurm.after import FINAL, describe
from slurm.controller import is_live
from slurm.history import JobFolder

REASONS = {
    "Priority": "others come first",
    "Resources": "waits for nodes to become free",
    "Dependency": "waits for the job before it",
    "DependencyNeverSatisfied": "the job before it has failed",
    "JobArrayTaskLimit": "as many of its tasks run as may at a time (ARRAY_AT_ONCE)",
    "BeginTime": "was just put back into the queue",
    "JobHeldUser": "held; `scontrol release {job}` lets it go on",
    "launch_failed_requeued_held": "a node could not start it; `scontrol release {job}` lets it go on",
    "job_requeued_in_held_state": "held; `scontrol release {job}` lets it go on",
    "JobHeldAdmin": "held by the cluster's people",
    "ReqNodeNotAvail": "the nodes it may use are down or reserved",
    "Nodes_required_for_job_are_DOWN": "the nodes it may use are down, drained or others' first",
    "PartitionTimeLimit": "asks for more time than its partition gives",
    "PartitionNodeLimit": "asks for more nodes than its partition gives",
    "BadConstraints": "no nodes are left that it may use",
}
LIMITS = {"QOS": "a limit of its QOS is reached", "Assoc": "a limit of its account is reached"}


def why(number: int, folder: JobFolder, jobs: Sequence[dict[str, str]]) -> str:
    """Why a job waits or has ended; of an array's elements each reason once; nothing where it runs.

    Args:
        jobs: the job, or an array's elements, as Slurm or `slurm.states` tells them.
    """
    ends = [line for line in folder.lines("end") if line["job"] == number]
    told = "" if not ends or ends[-1].get("again") else str(ends[-1]["why"])
    return "; ".join(filter(None, dict.fromkeys(_of_one(number, job, told) for job in jobs)))


def _of_one(number: int, job: dict[str, str], told: str) -> str:
    reason = job.get("Reason", "").partition(",")[0]
    # A cancelled job keeps the reason for which it had waited; this one is that of its end, too.
    if job["JobState"] == "PENDING" or reason == "DependencyNeverSatisfied":
        return f"{reason}: {_in_words(reason).format(job=number)}"
    if is_live(job):
        return ""
    code, _, signal = job.get("ExitCode", "0:0").partition(":")
    if not told and job["JobState"] == "FAILED" and (code, signal) != ("0", "0"):
        status = int(code) or 128 + int(signal)
        if status == ExitCode.RECIPE:  # ended before `slurm.after`, which would have told more
            return "a bad recipe, or no working Python on three nodes; see its log"
        return FINAL[status] if status in FINAL else describe(status)
    return told


def _in_words(reason: str) -> str:
    limits = (words for start, words in LIMITS.items() if reason.startswith(start))
    return REASONS.get(reason) or next(limits, "see `man squeue`")
