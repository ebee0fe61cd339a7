"""`bitdance data status` and `bitdance data retry`: the state of a dataset's tasks, read from its folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import MANIFEST_NAME
from data_pipeline.store import writing_to
from data_pipeline.tokenize.folder import DIED, FAILED, TASKS, DatasetFolder, Plan
from data_pipeline.tokenize.marker import DONE_NAME, counts_in_words, total_counts, without_samples
from foundation.errors import DataError, Problems, RecipeError
from foundation.partials import last_change, owner_has_ended
from foundation.progress import say

# A task under way touches its folder each minute; one that has not for so long has probably been killed.
ALIVE_SECONDS = 600.0
# Of these the pace is that of the job; and between two of them nobody was at work for longer than so many
# seconds and so many usual gaps. (Tasks that are begun together end together, so that a job without a pause
# has gaps of the length of a task.)
RECENT_TASKS, PAUSE_SECONDS, PAUSE_GAPS = 1000, 3600.0, 10


@dataclass(frozen=True)
class Status:
    """A dataset's tasks.

    Attributes:
        tasks: in the plan.
        done: finished.
        running: under way: a working folder that changed in the last ten minutes, and whose process, where it
            is of this host, lives; always 0 on S3, where the working folders are not in the dataset.
        failed: task -> reason.
        given_up: task that the dataset goes without -> reason.
        damaged: task that was found damaged, and is not done therefore -> how.
        counts: of finished tasks: samples read, not kept by the filter, too small for every class and
            refused, and records written (`read`, `not_kept`, `too_small`, `refused`, `records`).
        lists: where those that are too small or refused are listed.
        empty: which of them had a shard without any sample, in a line; "" where none had.
        samples_per_second: from one finished task to the next, of the last thousand, without the pauses: gaps
            above an hour and ten times the median one. None below two tasks.
        seconds_left: at that rate, for tasks that neither failed nor were given up; None where it is unknown.
        finished: whether the dataset has its manifest.
    """

    tasks: int
    done: int
    running: int
    failed: dict[int, str]
    given_up: dict[int, str]
    damaged: dict[int, str]
    counts: Counter[str]
    lists: str
    empty: str
    samples_per_second: float | None
    seconds_left: float | None
    finished: bool


def read_status(dataset: str | Path, now: float | None = None) -> Status:
    """Look at a dataset's folder.

    Args:
        dataset: the folder.
        now: seconds since the epoch; the clock's by default.

    Raises:
        DataError: no dataset has been begun there.
    """
    folder, plan = _open(dataset)
    now = time.time() if now is None else now
    done = folder.markers(range(len(plan.shards)))
    failures = {n: failure for n, failure in folder.failures().items() if n not in done}
    given_up = {n: note for n, note in folder.given_up().items() if n not in done}
    files = folder.store.files(TASKS)
    counts = total_counts(done)
    ends = [files[f"{folder.task(n)}/{DONE_NAME}"][1] for n in done]
    rate = left = None
    if pace := _seconds_a_task(ends):
        rate = counts["read"] / len(ends) / pace
        left = (len(plan.shards) - len(done) - len(given_up.keys() | failures.keys())) * pace
    return Status(
        tasks=len(plan.shards),
        done=len(done),
        running=sum(
            not owner_has_ended(path) and now - last_change(path) < ALIVE_SECONDS
            for path in folder.partials()
        ),
        failed={n: str(failure["reason"]) for n, failure in failures.items()},
        given_up={n: str(note["reason"]) for n, note in given_up.items()},
        damaged={n: str(note["reason"]) for n, note in folder.damaged().items()},
        counts=counts,
        lists=folder.quarantines,
        empty=without_samples(done),
        samples_per_second=rate,
        seconds_left=left,
        finished=folder.store.read(MANIFEST_NAME) is not None,
    )


def _seconds_a_task(ends: Sequence[float]) -> float | None:
    """Mean seconds from one task's end to the next one's, of the recent ones, without pauses; None where it
    is unknown."""
    gaps = np.diff(np.sort(ends)[-RECENT_TASKS:])
    worked = gaps[gaps <= max(PAUSE_SECONDS, PAUSE_GAPS * np.median(gaps))] if gaps.size else gaps
    return float(worked.mean()) or None if worked.size else None


def print_status(status: Status) -> None:
    """Say it in a few lines."""
    say(
        f"{status.done:,} of {status.tasks:,} tasks done, {status.running:,} under way, "
        f"{len(status.failed):,} failed, {len(status.given_up):,} given up; "
        f"the dataset is {'finished' if status.finished else 'not finished'}"
    )
    say(f"{counts_in_words(status.counts, status.lists)}; {status.counts['records']:,} records written")
    if status.empty:
        say(status.empty)
    if not status.finished and status.done + len(status.given_up) == status.tasks:
        say("no task is missing: `bitdance data finalize` finishes the dataset, or says why it cannot")
    if status.samples_per_second is not None and status.seconds_left is not None:
        left = f", {status.seconds_left / 3600:.1f} h left at that rate" if status.seconds_left else ""
        say(f"{status.samples_per_second:,.1f} samples a second{left}")
    for number, reason in sorted(status.failed.items()):
        say(f"task {number:05d} failed: {reason}")
    for number, reason in sorted(status.damaged.items()):
        say(f"task {number:05d} is damaged, and `bitdance data tokenize` makes it anew: {reason}")
    for number, reason in sorted(status.given_up.items()):
        say(f"task {number:05d} given up: {reason}")


def clear_failures(dataset: str | Path) -> int:
    """Forget all failures and deaths of workers, so that the next run tries those tasks again; the number of
    failures.

    Raises:
        DataError: no dataset has been begun there.
        PlaceUnusable: the folder cannot be written.
    """
    folder, _ = _open(dataset)
    failed = folder.failures()
    with writing_to(folder.root):
        for number in failed.keys() | folder.deaths().keys():
            folder.forget(number, FAILED, DIED)
    return len(failed)


def give_up(dataset: str | Path, numbers: Sequence[int]) -> None:
    """Record that the dataset goes without these tasks.

    Raises:
        RecipeError: numbers of no task, or of tasks that are done.
        PlaceUnusable: the disk is full, or cannot be written.
    """
    folder, plan = _open(dataset)
    failures, done = folder.failures(), folder.markers(numbers)
    problems = Problems()
    for number in numbers:
        if not 0 <= number < len(plan.shards):
            problems.add(f"task {number}", "no such task", f"they are 0 to {len(plan.shards) - 1}")
        elif number in done:
            problems.add(f"task {number:05d}", "is done", "only what is not done can be given up")
    problems.raise_if_any(RecipeError, f"Tasks of {dataset} cannot be given up")
    with writing_to(folder.root):
        for number in numbers:
            reason = failures.get(number, {}).get("reason", f"{plan.shards[number].label}: had not been done")
            folder.give_up(number, plan.shards[number], reason)


def _open(dataset: str | Path) -> tuple[DatasetFolder, Plan]:
    folder = DatasetFolder(dataset)
    plan = folder.read_plan()
    if plan is None:
        raise DataError(f"{dataset} holds no dataset that `bitdance data tokenize` has begun")
    return folder, plan
