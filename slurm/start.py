"""What a rank of a training job does: it asks its node whether it is fit, and trains."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from foundation.errors import ExitCode, UserError
from foundation.progress import say
from foundation.recipes import load_recipe
from slurm.after import committed_step
from slurm.history import JobFolder
from slurm.node_checks import Limits, add_limits
from slurm.preflight import announce, preflight
from trainer.rank import distributed_variables, run_rank
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder, find_run, makes_no_progress
from trainer.signals import StopFlag


def start(stop: StopFlag, arguments: list[str] | None = None) -> int:
    """Preflight, then training; the exit code is that of `bitdance train`, but 0 also for "saved".

    srun ends all ranks at the first bad exit, and those that have saved are still leaving then. Whether the
    run is finished, `slurm.after` sees by its export.

    Args:
        stop: set by signals.
        arguments: of the command line, after the module's name.
    """
    options = _parser().parse_args(arguments)
    os.environ.update(of_srun(os.environ))
    os.environ.update(distributed_variables(os.environ))
    speaks = os.environ["RANK"] == "0"
    if not options.recipe.exists():
        # Not the recipe's fault: it was there when the job was submitted.
        say(f"bitdance: bad node {os.environ.get('SLURMD_NODENAME', '?')}: it sees no {options.recipe}")
        return ExitCode.REQUEUE
    try:
        recipe = find_run(load_recipe(StageRecipe, options.recipe, options.overrides))
    except UserError as error:
        if speaks:
            say(str(error))
        return error.exit_code
    finished = RunFolder(Path(recipe.run)).finished_at()
    if finished is not None:
        if speaks:
            say(f"{recipe.run} is finished: {finished} steps, the model is in {recipe.run}/export")
        return ExitCode.DONE
    if JobFolder.of_run(recipe.run).is_cancelled(int(os.environ["SLURM_JOB_ID"])):
        return ExitCode.REQUEUE  # Slurm has started it anew before it could end
    limits = Limits(**{f.name: getattr(options, f.name) for f in fields(Limits)})
    verdict = preflight(recipe, limits, options.nodes.split(), os.environ)
    if speaks:
        announce(verdict)
        _note_start(recipe)
    if verdict.bad:
        # Of rank 0 alone, which has said so: at this bad exit srun ends the ranks that stay silent, too.
        return ExitCode.REQUEUE if speaks else ExitCode.DONE
    # The job's own starts alone count: before it was submitted a person has looked at the others.
    code = run_rank(recipe, stop, despite_no_progress=not _makes_no_progress(RunFolder(Path(recipe.run))))
    return ExitCode.DONE if code == ExitCode.REQUEUE else code


def of_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK as srun says it: sbatch hands on what they were in the shell of who
    submitted, a notebook or another launcher maybe.
    """
    srun = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {name: environment[theirs] for name, theirs in srun.items() if theirs in environment}


def _makes_no_progress(run: RunFolder) -> bool:
    began = JobFolder.of_run(run.path).began(int(os.environ["SLURM_JOB_ID"]))
    return makes_no_progress(run, committed_step(run), began)


def _note_start(recipe: StageRecipe) -> None:
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job = int(os.environ["SLURM_JOB_ID"])
    JobFolder.of_run(recipe.run).note("start", job, restart=restart, nodes=os.environ["SLURM_JOB_NODELIST"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm.rank")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    # Not asked of scontrol: there is none in a container.
    parser.add_argument("--nodes", required=True, help="all nodes of the job, in Slurm's order")
    add_limits(parser)
    return parser
