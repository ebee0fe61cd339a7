"""The last line of each batch script: does the job run again, or is this its end?

    python -m slurm.after [RECIPE] --code 75

Exit codes 0, 2, 65 and 78 end a job. After any other end (a signal and a save, a rank or a node that died, a
bug that may not strike twice) the job is put back into the queue under the same number, without the nodes
that the preflight found to be bad; unless three starts in a row came no further.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from foundation.errors import ExitCode, UserError
from foundation.progress import say
from foundation.recipe_document import RecipeDocument
from slurm.controller import SlurmError, expand_nodes, fields, patiently
from slurm.history import COMMENT, JobFolder
from trainer.checkpoint_files import committed
from trainer.run_folder import RunFolder, makes_no_progress

CONTROLLER_AWAY_SECONDS = 3600.0
COMMAND_FAILURES = 5  # of a command, whose progress is not known, after which it runs again
TOLD = "told to stop"
BAD_STARTS = 3  # in a row without a step in between, after which it is not the nodes' fault
FINAL: dict[int, str] = {
    ExitCode.DONE: "finished",
    2: "the command line is wrong",  # of Python, argparse, typer and bash
    ExitCode.DATA: "the data are bad",
    ExitCode.RECIPE: "the recipe is bad",
}
OWN_LOG = Path("/proc/self/fd/1")  # the job's, opened by its script; scontrol misreads a %% in its path
BAD_NODE = re.compile(r"^(?: *\d+: )?bitdance: bad node (\S+?): (.*)$", re.MULTILINE)  # srun may label lines


@dataclass(frozen=True)
class Start:
    """One start of a job: which one, where, and how it ended.

    Attributes:
        name: what Slurm's commands call it: the number, or ARRAY_ELEMENT (an array's number stands for all).
        restart: how many starts of the job were before it.
        nodes: as Slurm abbreviates them.
        code: exit code of the job's step.
        count: how many nodes.
        told: whether it was told to stop.
    """

    job: int
    restart: int
    nodes: str
    code: int
    name: str = ""
    count: int = 1
    told: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], code: int, told: bool) -> Start:
        """The start that this process belongs to."""
        restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        job, nodes = environment["SLURM_JOB_ID"], environment["SLURM_JOB_NODELIST"]
        element = environment.get("SLURM_ARRAY_TASK_ID")
        name = job if element is None else f"{environment['SLURM_ARRAY_JOB_ID']}_{element}"
        count = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
        return cls(int(job), restart, nodes, code, name, count, told)


@dataclass(frozen=True)
class Decision:
    """What becomes of the job: `again` or not, with which exit code, without which nodes, and why.

    Attributes:
        reasons: what is wrong with those nodes, as `reasons_of` gives it.
    """

    again: bool
    code: int
    why: str
    without: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def decide(start: Start, log: str, run: RunFolder | None, history: JobFolder | None) -> Decision:
    """Whether a start's end is the job's.

    Args:
        log: what the job has printed, over all of its starts.
        run: where it trains, None for other commands.
        history: of the run.
    """
    if start.code in FINAL:
        return Decision(False, start.code, FINAL[start.code])
    begun = [line["job"] for line in history.lines("start")] if history is not None else []
    if start.job in begun and begun[-1] != start.job:
        # It has taken the run over (plain sbatch refuses no second job). Two would do so in turns for ever.
        return Decision(False, ExitCode.RECIPE, f"job {begun[-1]} trains this run")
    bad = bad_nodes(log[max(0, log.rfind("bitdance: start ")) :])
    # Of this job alone: before another one was submitted a person has looked at what had happened.
    ends = [end for end in history.lines("end") if end["job"] == start.job] if history is not None else []
    if len(bad) == start.count > 1 and len(set(bad.values())) == 1:
        return Decision(False, ExitCode.RECIPE, f"all {start.count} nodes say: {next(iter(bad.values()))}")
    if bad:
        said = reasons_of(bad.values())
        if [tuple(end.get("reasons", ())) for end in ends[-BAD_STARTS + 1 :]] == [said] * (BAD_STARTS - 1):
            why = f"three starts in a row, each on other nodes, say: {'; '.join(bad.values())}"
            return Decision(False, ExitCode.RECIPE, why, tuple(bad), said)
        why = "; ".join(f"{node}: {reason}" for node, reason in bad.items())
        return Decision(True, ExitCode.REQUEUE, why, tuple(bad), said)
    if run is None or history is None:
        return decide_for_command(start, log)
    step = committed_step(run)
    untold = [end for end in ends if not end.get("told")][-BAD_STARTS + 1 :]
    stuck = not start.told and [end["step"] for end in untold] == [step] * (BAD_STARTS - 1)
    if stuck or makes_no_progress(run, step, history.began(start.job)):
        return Decision(
            False,
            ExitCode.BUG,
            f"three starts in a row never got past step {step}; the last one: {describe(start.code)}",
        )
    return Decision(True, ExitCode.REQUEUE, describe(start.code))


def decide_for_command(start: Start, log: str) -> Decision:
    """The same where nothing but the job's log tells of its earlier starts."""
    if start.code == ExitCode.BUG:
        return Decision(False, ExitCode.BUG, describe(start.code))
    if start.told:
        return Decision(True, ExitCode.REQUEUE, TOLD)
    # Not those that Slurm has restarted, for a lost node or another job.
    failed = re.findall(rf"^bitdance: again: (?!{TOLD}$)", log, re.MULTILINE)
    # One log may be that of several jobs, or of this start alone: each own failure was followed by a restart.
    failures = min(len(failed), start.restart) if "bitdance: start 0 " in log else start.restart
    if failures >= COMMAND_FAILURES:
        return Decision(False, ExitCode.BUG, f"{describe(start.code)}, after {failures} failures")
    return Decision(True, ExitCode.REQUEUE, describe(start.code))


def bad_nodes(log: str) -> dict[str, str]:
    """The nodes that a log names as bad, and all that is wrong with each."""
    found: dict[str, dict[str, None]] = {}
    for node, reason in BAD_NODE.findall(log):
        found.setdefault(node, {})[reason] = None  # once, however many ranks say so
    return {node: "; ".join(reasons) for node, reasons in found.items()}


def reasons_of(said: Iterable[str]) -> tuple[str, ...]:
    """What is wrong with nodes, but for the figures: those differ from node to node."""
    return tuple(sorted({re.sub(r"\d+(\.\d+)?", "#", reason) for reason in said}))


def committed_step(run: RunFolder) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    newest = committed(run)
    return newest[0][0] if newest else 0


def describe(code: int) -> str:
    """An exit code in words."""
    if code == ExitCode.REQUEUE:
        return "saved, wants to go on"
    if code > 128 and code - 128 in set(signal.Signals):
        return f"a process was ended by {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def main(arguments: list[str] | None = None) -> int:
    """Decide, write it down and carry it out; the exit code for the batch script."""
    # A requeue ends this process too, by SIGTERM; what is left to do then must be done.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m slurm.after")
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--told", action="store_true")
    options, _ = parser.parse_known_args(arguments)  # what else is there is for the ranks
    start = Start.from_environment(os.environ, options.code, options.told)
    run = history = None
    if options.recipe:
        path = run_of(options.recipe, options.overrides)
        if path is None:
            return start.code or ExitCode.RECIPE  # a recipe that cannot be read: the ranks have said so
        run, history = RunFolder(path), JobFolder.of_run(path)
        if start.code == ExitCode.DONE and run.finished_at() is None:
            start = replace(start, code=ExitCode.REQUEUE)  # the ranks have left in peace, before the end
    done = start.code == ExitCode.DONE
    # A finished run needs nobody's consent. Of a data job the record alone tells where its traces go.
    job = {} if done and run is not None else record_of(start, 0.0 if done else CONTROLLER_AWAY_SECONDS)
    if job is None:
        return ExitCode.DONE if done else ExitCode.REQUEUE
    decision = decide(start, own_log(), run, history)
    cancelled = history is not None and history.is_cancelled(start.job)
    step = committed_step(run) if run else None
    if cancelled and decision.again:
        saved = f"step {step} is saved" if step else "nothing is saved yet"
        decision = Decision(False, ExitCode.REQUEUE, f"cancelled, as asked; {saved}")
    if decision.again and not _may_run_again(job):
        decision = replace(decision, again=False, why=f"{decision.why}; but Slurm says {job['JobState']}")
    traces = history or traces_of(start, job)
    if traces is not None:
        where = {"nodes": start.nodes, "restart": start.restart, "step": step}
        what = {"code": start.code, "told": start.told, "again": decision.again, "why": decision.why}
        nodes = {"without": list(decision.without), "reasons": list(decision.reasons)}
        traces.note("end", start.job, **where, **what, **nodes)
    say(f"bitdance: {'again' if decision.again else 'the end'}: {decision.why}")
    try:
        if cancelled:
            patiently(CONTROLLER_AWAY_SECONDS, "scancel", start.name)
        elif decision.again:
            run_again(start, job, decision)
    except SlurmError as error:
        say(f"bitdance: {error}")
    return decision.code


def record_of(start: Start, patience: float) -> dict[str, str] | None:
    """The job as the controller knows it; None where that does not answer, or the job is not this start's."""
    try:
        job = fields(patiently(patience, "scontrol", "show", "job", start.name, "-o"))
    except SlurmError as error:
        say(f"bitdance: {error}")
        return None
    if int(job["Restarts"]) != start.restart:
        # Slurm has lost sight of this node meanwhile and started the job elsewhere. It is not ours any more.
        say(f"bitdance: start {start.restart} of job {start.job} has been replaced; it ends here")
        return None
    return job


def traces_of(start: Start, job: Mapping[str, str]) -> JobFolder | None:
    """Where the end of a data job is written down; an array's elements, thousands maybe, have logs only."""
    _, ours, path = job.get("Comment", "").partition(COMMENT)
    return JobFolder(Path(path)) if ours and start.name == str(start.job) else None


def _may_run_again(job: Mapping[str, str]) -> bool:
    """Whether Slurm would put it back: not one that was cancelled meanwhile, but one whose time is over."""
    timed_out = job.get("Reason") == "TimeLimit" and job["JobState"] != "CANCELLED"
    return timed_out or job["JobState"] == "RUNNING"


def run_of(recipe: str, overrides: Sequence[str]) -> Path | None:
    """The run folder that a recipe names; the rest may be of a version that this code does not know."""
    try:
        run = RecipeDocument(Path(recipe), overrides).values.get("run")
    except (UserError, RecursionError):
        return None
    return Path(run) if isinstance(run, str) else None


def own_log() -> str:
    """What the job has printed, over all of its starts; nothing where that is no file."""
    try:
        return OWN_LOG.read_text(errors="replace") if OWN_LOG.is_file() else ""
    except OSError:
        return ""


def run_again(start: Start, job: Mapping[str, str], decision: Decision) -> None:
    """Put the job back into the queue, without the nodes that have been found to be bad."""
    try:
        patiently(CONTROLLER_AWAY_SECONDS, "scontrol", "requeue", start.name)
    except SlurmError as error:
        if "Job is pending execution" not in str(error):
            raise
        # A requeue before this one has been carried out, and its answer was lost.
    if decision.without:
        # Only a pending job can be told so. It waits some seconds before it may start again.
        excluded = {*expand_nodes(job["ExcNodeList"]), *decision.without}
        change = f"ExcNodeList={','.join(sorted(excluded))}"
        patiently(CONTROLLER_AWAY_SECONDS, "scontrol", "update", f"JobId={start.name}", change)


if __name__ == "__main__":
    sys.exit(main())
