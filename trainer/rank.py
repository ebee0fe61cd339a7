"""One rank of a training run: `python -m trainer.rank RUN/recipe.yaml`, as `launch` starts it.

Under torchrun or srun the command `bitdance train` itself comes here. Nothing heavy is imported before
signals are caught, so that a scheduler's first warning is never lost.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from foundation.errors import ExitCode, RecipeError, UserError
from foundation.parent_process import die_with
from foundation.progress import say
from foundation.recipes import load_recipe
from trainer.launch import PARENT_VARIABLE
from trainer.lost_ranks import RankLost, lost_another
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder, claimed, note_refusal, take_start
from trainer.signals import STOP_SIGNALS, StopFlag
from trainer.terminal import Terminal


class OtherRanksFault(UserError):
    """Another rank has told why this start ends; there is nothing to add."""

    def __init__(self, code: ExitCode):
        super().__init__("another rank has met a fault and said so; this one ends with it")
        self.exit_code = code


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank that `launch` has started."""
    stop = StopFlag()
    stop.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `launch` holds them back until here
    launcher = os.environ.get(PARENT_VARIABLE)
    if launcher is not None:  # ranks that nobody waits for would train on, and block the next start
        die_with(int(launcher))
    parser = argparse.ArgumentParser(prog="python -m trainer.rank")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--despite-no-progress", action="store_true")
    options = parser.parse_args(arguments)
    recipe = load_recipe(StageRecipe, options.recipe)
    return run_rank(recipe, stop, options.despite_no_progress)


def join_run(find: Callable[[], StageRecipe | None], despite_no_progress: bool) -> int:
    """Train as one of the ranks that torchrun or srun has started: where, rank 0 alone decides.

    The others do not look at the run folder: they would meet it half made, or choose another one.

    Args:
        find: on rank 0, the recipe, pointed at its run folder; None where there is nothing to do.

    Raises:
        UserError, OSError: on rank 0, what `find` raises; the other ranks return its exit code.
        RankLost: rank 0 is gone before it has decided.
    """
    stop = StopFlag()
    stop.install()
    os.environ.update(distributed_variables(os.environ))
    gc.disable()  # `_train` says why
    import torch.distributed as dist

    from trainer.engine import start_distributed
    from trainer.peers import decided_by_first, stop_distributed

    try:
        start_distributed()
        recipe = decided_by_first(find)
        return ExitCode.DONE if recipe is None else run_rank(recipe, stop, despite_no_progress)
    except (UserError, OSError) as error:
        if not dist.is_initialized() or dist.get_rank() == 0 or isinstance(error, RankLost):
            raise
        return error.exit_code if isinstance(error, UserError) else ExitCode.RECIPE
    finally:
        stop_distributed()


def run_rank(recipe: StageRecipe, stop: StopFlag, despite_no_progress: bool) -> ExitCode:
    """Train as the rank that the environment says, and turn every end into an exit code."""
    os.environ.update(distributed_variables(os.environ))
    rank = int(os.environ["RANK"])
    run = RunFolder(Path(recipe.run))
    run.logs.mkdir(parents=True, exist_ok=True)
    # This run's own compiled extensions: builds of two jobs collide in a shared folder.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(run.extensions)
    terminal = Terminal(run.logs / f"rank-{rank}.log", echo=rank == 0)
    if rank:  # what rank 0 says at its start is more
        say(f"rank {rank} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}, process {os.getpid()}")
    try:
        return _train(recipe, run, stop, terminal, despite_no_progress)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  (the last resort: whatever it is, it is logged and has an exit code)
        traceback.print_exc()
        sys.stderr.flush()
        what = "has lost another rank" if lost_another(error) else f"failed: {error!r}"
        terminal.complain(f"rank {rank} {what}. The traceback is in {run.logs}/rank-{rank}.log")
        # Not a return: threads and collectives of a broken rank may never end.
        os._exit(ExitCode.BUG)


def _train(
    recipe: StageRecipe, run: RunFolder, stop: StopFlag, terminal: Terminal, despite_no_progress: bool
) -> ExitCode:
    gc.disable()  # what is imported stays: looking it through for garbage, again and again, takes a second
    import torch
    import torch.distributed as dist

    from trainer.engine import start_distributed
    from trainer.loop import train
    from trainer.peers import decided_by_first, ends_with_others, first_to_say, stop_distributed, told_fault
    from trainer.stage import Stage
    from trainer.watchdog import LEAVE_SECONDS, ends_within

    torch.set_num_threads(recipe.world.threads)
    crashed, number = False, None
    try:
        if not dist.is_initialized():
            start_distributed()
        gc.freeze()
        gc.enable()
        with ExitStack() as held:
            number = decided_by_first(
                lambda: _begin(recipe, dist.get_world_size(), despite_no_progress, held)
            )
            if number is None:
                say(f"{run.path} has been finished meanwhile: the model is in {run.export}")
                return ExitCode.DONE
            held.enter_context(ends_with_others())
            stage = Stage(recipe, run, number, stop, terminal)
            held.callback(stage.close)
            return train(stage)
    except UserError as error:
        if first_to_say(error):
            terminal.complain(str(error))
            if number is not None and error.exit_code in (ExitCode.RECIPE, ExitCode.DATA):
                note_refusal(run, number, error.exit_code)
        raise
    except Exception as error:
        code = told_fault()
        if code is None:
            crashed = True
            raise
        raise OtherRanksFault(code) from error  # its leaving is what this rank has met
    finally:
        with ends_within(LEAVE_SECONDS):  # a broken rank's connections may never close
            # srun, where a rank was killed, tells the others to stop, and waits for them.
            stop_distributed(lambda: not (crashed and stop.asked))


def _begin(recipe: StageRecipe, ranks: int, despite_no_progress: bool, held: ExitStack) -> int | None:
    """On rank 0: the number of this start, None where the run has been finished meanwhile.

    Args:
        held: takes the run's lock, where the command that has started this rank does not hold it.
    """
    from trainer.checkpoint_files import committed

    run = RunFolder(Path(recipe.run))
    if PARENT_VARIABLE not in os.environ:
        held.enter_context(claimed(recipe))
    newest = committed(run)
    number = take_start(run, newest[0][0] if newest else 0, ranks, despite_no_progress)
    # Finished by a start that was given up for lost: from here on it could not have been.
    return number if run.finished_at() is None else None


def leave(code: int) -> NoReturn:
    """End this process at once. All that matters is closed; what Python does besides at its end, taking apart
    some thousand modules, is seconds in which a batch system waits.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def distributed_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, translated from srun's where those are
    missing.

    Raises:
        RecipeError: some cannot be known.
    """
    srun = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    found = {name: environment.get(name, environment.get(theirs, "")) for name, theirs in srun.items()}
    found |= {name: environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise RecipeError(
            f"This process was started as one of several ranks, but {', '.join(missing)} is not set. Start "
            "it by torchrun, or by srun with MASTER_ADDR and MASTER_PORT set, or by plain `bitdance train` "
            "on one machine."
        )
    return found


if __name__ == "__main__":
    leave(main())
