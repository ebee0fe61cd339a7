"""Who does the tasks: worker processes, which are told one after the other, or the job's own process.

What kills a worker (a decoder's crash, want of memory) may be its shard's fault, and then kills every further
one, in this start and in all others. So the process that hands out the tasks counts deaths, in the dataset's
folder: after the first a new worker tries the task again behind all others, after the second it has failed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from data_pipeline.store import writing_to
from data_pipeline.tokenize.folder import DatasetFolder, Plan
from data_pipeline.tokenize.recipe import TokenizeRecipe
from data_pipeline.tokenize.workshop import GOES_ON, LESS_MEMORY, MachineFails, WorkerDied, Workshop
from foundation.errors import UserError
from foundation.parent_process import die_with
from foundation.progress import say

DEATHS = 2  # of workers at a task, after which it has failed
DEATHS_IN_A_ROW = 8  # with no task done between them, which no longer speak of single shards
# Whoever kills the whole job may reach its workers first; after so long this process would be gone, too.
OWN_END_SECONDS = 1.0
# By people and schedulers: no shard's fault.
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def work_here(
    recipe: TokenizeRecipe, plan: Plan, index: Path | None, missing: list[int]
) -> Iterator[tuple[int, str | None]]:
    """Do tasks in this process, and die with the first that kills it; yields each with the reason of its
    failure."""
    with Workshop(recipe, plan, index, 0) as workshop:
        for number in missing:
            try:
                reason = workshop.attempt(number)
            except WorkerDied as death:
                raise WorkerDied(
                    f"{plan.shards[number].label}: {death}; {GOES_ON}. With compute.processes above 0 "
                    "a shard that does so again fails alone"
                ) from death
            yield number, reason


def work_in_processes(
    recipe: TokenizeRecipe, plan: Plan, index: Path | None, missing: list[int], processes: int
) -> Iterator[tuple[int, str | None]]:
    """Do tasks in worker processes; yields each with the reason of its failure, as they end.

    Raises:
        MachineFails: workers die one after the other, or before they have a task; or one was told to end.
        UserError: what ended a worker, other than the data of its task.
    """
    folder, waiting, left, in_a_row = DatasetFolder(recipe.output), deque(missing), len(missing), 0
    workers = [_Worker(Workshop(recipe, plan, index, place)) for place in range(processes)]
    try:
        while left:
            worker = _next_to_speak(workers)
            number, word = worker.listen()
            if number is not None and isinstance(word, WorkerDied):
                worker.process.join()
                workers.remove(worker)
                in_a_row += 1
                if reason := _count_death(folder, plan, number, word, in_a_row):
                    left -= 1
                    yield number, reason
                else:
                    waiting.append(number)
                if waiting:
                    workers.append(_Worker(worker.workshop))
                continue
            if isinstance(word, UserError):
                raise word
            if number is not None:
                left, in_a_row = left - 1, 0
                yield number, word
            if waiting:
                worker.tell(waiting.popleft())
    finally:
        for worker in workers:
            if left:
                worker.process.terminate()
            else:
                worker.tell(None)
        for worker in workers:
            worker.process.join()


class _Worker:
    """A worker process, and the line to it.

    Attributes:
        workshop: what it works with.
        task: what it has been told and not answered yet.
    """

    def __init__(self, workshop: Workshop):
        # Not fork: the parent has threads of DuckDB and torch, and a GPU's context does not survive it.
        context = multiprocessing.get_context("spawn")
        self.workshop = workshop
        self.task: int | None = None
        self.line, its_end = context.Pipe()
        self.process = context.Process(target=_work, args=(workshop, its_end, os.getpid()))
        self.process.start()
        its_end.close()  # so that the line ends with the worker

    def tell(self, number: int | None) -> None:
        """Have it do a task, or end."""
        self.task = number
        with suppress(OSError):  # it has just died, which is heard next
            self.line.send(number)

    def listen(self) -> tuple[int | None, str | UserError | None]:
        """The task that it had, and what it says: as `_work` does; or, where it is gone, why."""
        number, self.task = self.task, None
        try:
            return number, self.line.recv()
        except (EOFError, OSError):
            self.process.join()
        ended = -(self.process.exitcode or 0)
        if number is not None and ended not in ASKED_TO_END:
            return number, WorkerDied(_how(ended))
        return number, MachineFails(
            f"A worker process that had no task, or was told to end: {_how(ended)}; {GOES_ON}"
        )


def _work(workshop: Workshop, line: Any, parent: int) -> None:
    """What a worker process does: says None when it is ready, then of each task that it is told the reason of
    its failure, or None; an error, where it can do no more."""
    die_with(parent)
    # On Ctrl-C its parent stops it, and only the parent speaks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with writing_to(workshop.recipe.output), workshop:
            line.send(None)
            while (number := line.recv()) is not None:
                line.send(workshop.attempt(number))
    except UserError as error:
        line.send(error)


def _next_to_speak(workers: list[_Worker]) -> _Worker:
    speaking = wait([worker.line for worker in workers])
    return next(worker for worker in workers if worker.line in speaking)


def _count_death(
    folder: DatasetFolder, plan: Plan, number: int, death: WorkerDied, in_a_row: int
) -> str | None:
    """Record that a worker died at a task; the reason of the task's failure, where it was not the first one.

    Raises:
        MachineFails: too many died one after the other.
    """
    time.sleep(OWN_END_SECONDS)
    shard = plan.shards[number]
    reason = None
    if folder.note_death(number, shard, str(death)) < DEATHS:
        say(f"task {number:05d}: {shard.label}: its worker died, and another one will try again: {death}")
    else:
        reason = f"{shard.label}: its worker died twice, the last time so: {death}"
        folder.fail(number, shard, reason)
    if in_a_row == DEATHS_IN_A_ROW:
        raise MachineFails(
            f"{in_a_row} workers died one after the other, the last one at {shard.label} ({death}); "
            f"so it may be the machine. Otherwise {GOES_ON}"
        )
    return reason


def _how(ended: int) -> str:
    """How a process ended: by a signal, or with the negative of an exit code."""
    if ended <= 0:
        return f"it ended with exit code {-ended}"
    why = "a library crashed, such as a decoder"
    if ended == signal.SIGKILL:
        why = f"probably out of memory: {LESS_MEMORY}"
    return f"it was ended by signal {ended}, {signal.strsignal(ended)} ({why})"
