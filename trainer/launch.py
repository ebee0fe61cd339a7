"""Starts the ranks of a run on this machine, and ends when they end. Imports no torch."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from foundation.errors import ExitCode
from foundation.progress import say
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder
from trainer.signals import STOP_SIGNALS
from trainer.watchdog import LEAVE_SECONDS

GRACE_SECONDS = 10.0  # for the other ranks to come to an end by themselves, after one has failed
KILLED_SECONDS = 10.0  # for the kernel to end what was killed: a call to a disk that hangs it cannot end
PARENT_VARIABLE = "BITDANCE_LAUNCHER_PID"


def started_as_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or srun has started this process as one rank of several."""
    return {"RANK", "WORLD_SIZE"} <= environment.keys() or {
        "SLURM_PROCID",
        "MASTER_ADDR",
    } <= environment.keys()


def launch(recipe: StageRecipe, arguments: list[str]) -> ExitCode:
    """Run `world.processes` ranks until all have ended; the run folder must hold the resolved recipe, and
    this process the folder.

    A signal to stop is passed on, and the ranks save; a second one ends them at once. When one rank has ended
    the others are ended too, after `_patience`: they would wait for it for ever, or hang.

    Args:
        arguments: further command line arguments of `python -m trainer.rank`.
    """
    run = RunFolder(Path(recipe.run))
    port = _free_port()
    # Held back here until they can be passed on, and in each rank (which inherits that) until it can answer:
    # a rank that is still importing would end with a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    ranks = [_start_rank(recipe, rank, port, arguments) for rank in range(recipe.world.processes)]
    signals = _Signals(ranks)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    ends: dict[int, int] = {}
    deadline = math.inf
    while len(ends) < len(ranks) and time.monotonic() < deadline and not signals.impatient:
        time.sleep(0.05)
        signals.tell()
        if new := _new_ends(ranks, ends):
            ends |= new
            copies = bool(signals.asked) and recipe.checkpoints.remote is not None
            deadline = min(deadline, time.monotonic() + _patience(ends, copies))
    late = [rank for rank in range(len(ranks)) if rank not in ends]
    _kill([ranks[rank] for rank in late])
    if signals.impatient:
        ends |= dict.fromkeys(late, -signal.SIGKILL)
    elif late:  # what they end with is our doing, and changes no exit code
        logs = ", ".join(f"{run.logs}/rank-{rank}.log" for rank in late)
        _say_if_heard(f"Killed what did not end though other ranks had. How far it came is in {logs}")
    return _verdict(ends, run)


def _start_rank(recipe: StageRecipe, rank: int, port: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(recipe.world.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT_VARIABLE: str(os.getpid()),
    }
    command = [sys.executable, "-m", "trainer.rank", str(Path(recipe.run) / "recipe.yaml"), *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


def _patience(ends: dict[int, int], copies: bool) -> float:
    """Seconds in which the other ranks may come to an end by themselves.

    Args:
        ends: as of `_verdict`.
        copies: rank 0 may still be copying to the object store what was saved; the others have no such reason
            to stay, and rank 0 goes last.
    """
    if _first_fault(ends) is not None:
        return GRACE_SECONDS
    if 0 in ends or (ExitCode.REQUEUE in ends.values() and not copies):
        return LEAVE_SECONDS + GRACE_SECONDS  # each has so long to leave, and then ends itself if it can
    return math.inf


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
    last = time.monotonic() + KILLED_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < last:
        time.sleep(0.05)


class _Signals:
    """Passes signals on to the ranks, and notes when a person has lost patience."""

    def __init__(self, ranks: list[subprocess.Popen[bytes]]):
        self.impatient = False
        self.asked, self._ranks, self._told = "", ranks, False
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.impatient = bool(self.asked) and number == signal.SIGINT
        self.asked = self.asked or signal.Signals(number).name
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def tell(self) -> None:
        """Say once that a signal has come; not where it comes, which may be in the middle of a print."""
        if self.asked and not self._told:
            self._told = True
            below_the_bar = "\n" if sys.stdout.isatty() else ""
            _say_if_heard(
                f"{below_the_bar}{self.asked}: stopping; the ranks save at the end of their step (the first "
                "one, if they are still starting). Ctrl-C once more ends them at once."
            )


def _new_ends(ranks: list[subprocess.Popen[bytes]], known: dict[int, int]) -> dict[int, int]:
    """Exit codes, by rank, of those that have ended since; a kill before what other ranks make of it."""
    found = {rank: process.poll() for rank, process in enumerate(ranks) if rank not in known}
    ends = ((rank, code) for rank, code in found.items() if code is not None)
    return dict(sorted(ends, key=lambda end: end[1] >= 0))


def _first_fault(ends: dict[int, int]) -> int | None:
    """The rank that was the first to end in another way than done or saved."""
    return next((rank for rank, code in ends.items() if code not in (ExitCode.DONE, ExitCode.REQUEUE)), None)


def _verdict(ends: dict[int, int], run: RunFolder) -> ExitCode:
    """One exit code for all ranks: the recipe's or the data's fault before ours, and any fault before
    success. Of other faults the first counts: a rank that was killed takes the others' connections with it,
    and they end with errors that are not theirs.

    Args:
        ends: exit codes (negative: a signal's number) by rank, in the order of the ends.
    """
    for code in (ExitCode.RECIPE, ExitCode.DATA):
        if code in ends.values():
            return code
    first = _first_fault(ends)
    if first is None:
        return ExitCode.REQUEUE if ExitCode.REQUEUE in ends.values() else ExitCode.DONE
    if ends[first] > 0:
        return ExitCode.BUG
    _say_if_heard(
        f"Rank {first} was ended by {signal.Signals(-ends[first]).name}. Its log is "
        f"{run.logs}/rank-{first}.log; the same command goes on from the last checkpoint."
    )
    return ExitCode.REQUEUE


def _say_if_heard(message: str) -> None:
    """Say it. Nobody may read on, or the disk be full: the ranks, which end with this process, save first."""
    try:
        say(message)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else what is left in it fails again at the exit)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
