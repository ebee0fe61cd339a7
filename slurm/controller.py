"""Slurm's controller, as its commands let a user talk to it: sbatch, scontrol, squeue, scancel, sacct."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping

from foundation.errors import ExitCode, RecipeError

ENDED = frozenset(
    {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL", "NODE_FAIL"}
    | {"PREEMPTED"}  # for good: one that is to run again is pending
)
CLIENTS = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})  # what Slurm's commands need themselves
ANSWER_SECONDS = 60.0
# What Slurm's commands say of a controller that is away, is starting or has too much to do.
_AWAY = re.compile(
    r"[Uu]nable to contact|Socket timed out on send/recv|Zero Bytes were transmitted or received"
)
_FIELD = re.compile(r"(?:^| )([A-Za-z][A-Za-z/:]*)=")  # of `scontrol --oneliner`; values may contain spaces


class SlurmError(RecipeError):
    """A command of Slurm has refused; its own words are in the message."""


class ControllerAway(SlurmError):
    """slurmctld does not answer; the same command does its work once it does."""

    exit_code = ExitCode.REQUEUE

    def __init__(self, said: str):
        super().__init__(
            f"Slurm's controller does not answer ({said}): try again when it does; what runs goes on"
        )


def own_surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what Slurm says of the job that this process is itself part of (an `salloc`, a
    notebook): sbatch hands its environment on, and the new job would take all of that for its own.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("SLURM_", "SLURMD_")) or name in CLIENTS
    }


def missing_commands() -> list[str]:
    """Which of Slurm's commands are not on the PATH."""
    return [name for name in ("sbatch", "scontrol", "squeue", "scancel") if shutil.which(name) is None]


def slurm(*command: str, text: str | None = None) -> str:
    """Output of one of Slurm's commands.

    Args:
        text: for its standard input.

    Raises:
        ControllerAway: the controller does not answer, within a minute at most.
        SlurmError: the command is not there, or refuses.
    """
    try:
        done = subprocess.run(
            command,
            env=own_surroundings(os.environ),
            input=text,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
            errors="replace",
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} was not found: run this on a login node of the cluster, where Slurm's commands are"
        ) from None
    except subprocess.TimeoutExpired:
        raise ControllerAway(f"{command[0]} has had no answer for {ANSWER_SECONDS:.0f} s") from None
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        said = f"{command[0]}: {'; '.join(lines) or f'exit code {done.returncode}'}"
        raise ControllerAway(said) if _AWAY.search(said) else SlurmError(said)
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """`Key=value Key=value ...` as `scontrol --oneliner` prints it; a value may hold spaces.

    >>> fields("JobId=7 JobName=a b NodeList=n[1-2]")
    {'JobId': '7', 'JobName': 'a b', 'NodeList': 'n[1-2]'}
    """
    matches = list(_FIELD.finditer(line))
    ends = [match.start() for match in matches[1:]] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(matches, ends, strict=True)}


def show(entity: str, name: str = "") -> list[dict[str, str]]:
    """What `scontrol show` tells of jobs, partitions or nodes; [] where there is none of that name.

    Raises:
        ControllerAway: the controller does not answer.
    """
    try:
        output = slurm("scontrol", "show", entity, *([name] if name else []), "--oneliner")
    except SlurmError as error:
        if re.search(r"[Ii]nvalid job id|not found", str(error)):
            return []
        raise
    return [fields(line) for line in output.splitlines() if "=" in line]


def all_jobs() -> dict[int, list[dict[str, str]]]:
    """What the controller knows of jobs, by number; of an array each element.

    Raises:
        ControllerAway: the controller does not answer.
        SlurmError: Slurm is not here.
    """
    known: dict[int, list[dict[str, str]]] = {}
    for job in show("job"):
        known.setdefault(int(job.get("ArrayJobId", job["JobId"])), []).append(job)
    return known


def live(number: int) -> list[dict[str, str]]:
    """A job, or an array's elements, where it is waiting, running or about to run again."""
    return [job for job in show("job", str(number)) if is_live(job)]


def is_live(job: dict[str, str]) -> bool:
    """Whether a job is waiting, running or about to run again."""
    return job["JobState"] not in ENDED


def patiently(seconds: float, *command: str) -> str:
    """`slurm`, again and again while the controller is away.

    Raises:
        SlurmError: it refuses, or is away for longer than that.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return slurm(*command)
        except ControllerAway:
            if time.monotonic() > deadline:
                raise
        time.sleep(2)


def expand_nodes(expression: str) -> list[str]:
    """`n[1-3]` as a list of names."""
    if not expression or expression == "(null)":
        return []
    return slurm("scontrol", "show", "hostnames", expression).split()
