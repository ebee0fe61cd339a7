"""What a run's jobs did, beside the run: `RUN/slurm/history.jsonl`, the script and the log of each job.

A line: {"time", "event", "job", ...}; the events are "submitted", "start", "end" and "cancel".
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.files import open_locked

COMMENT = "bitdance "  # what a job's comment begins with; the path of its `JobFolder` follows


@dataclass(frozen=True)
class JobFolder:
    """The folder in which a run's (or a dataset's) jobs leave their traces."""

    path: Path

    history = property(lambda self: self.path / "history.jsonl")

    @classmethod
    def of_run(cls, run: str | Path) -> JobFolder:
        """Of a training run."""
        return cls(Path(run) / "slurm")

    @classmethod
    def beside(cls, output: str | Path) -> JobFolder:
        """Of a data job: beside its output, since that folder belongs to the recipe alone; where that is in
        an object store, below `data/`.
        """
        _, remote, name = str(output).partition("://")
        output = Path("data") / name if remote else Path(output)
        return cls(output.with_name(f"{output.name}.slurm"))

    def log_pattern(self, name: str) -> str:
        """Where sbatch writes what a job prints: `name` has patterns (%j), the folder's own % are none."""
        return f"{str(self.path.resolve()).replace('%', '%%')}/{name}"

    def note(self, event: str, job: int, **details: Any) -> None:
        """Append a line."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": time.time(), "event": event, "job": job, **details}) + "\n"
        with open(self.history, "a") as file:  # one write of a short line: appended whole
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines, oldest first; of one event only where it is given."""
        try:
            text = self.history.read_text()
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut short by a kill
        return [line for line in found if event in (None, line["event"])]

    def began(self, job: int) -> float:
        """When a job first started, in seconds since 1970; infinity where it never did."""
        return min(
            (float(line["time"]) for line in self.lines("start") if line["job"] == job), default=math.inf
        )

    def is_cancelled(self, job: int) -> bool:
        """Whether `bitdance cancel` has asked for a job's end, and Slurm has taken it."""
        asked = [line for line in self.lines("cancel") if line["job"] == job]
        return bool(asked) and not asked[-1].get("withdrawn")

    def jobs(self) -> list[int]:
        """The latest job, after those of this folder that it waits for: an array, before what finishes its
        dataset.
        """
        waits_for = self.all_jobs()
        found = list(waits_for)[-1:]
        while found and (before := waits_for[found[0]]) in waits_for:
            found.insert(0, before)
        return found

    def all_jobs(self) -> dict[int, int | None]:
        """Every job that was submitted or has started here, oldest first, and the one that it waits for."""
        waits_for: dict[int, int | None] = {}
        for line in self.lines():
            if line["event"] in ("submitted", "start"):  # a job of plain `sbatch` leaves its starts alone
                waits_for.setdefault(int(line["job"]), line.get("after"))
        return waits_for

    @contextmanager
    def held(self) -> Iterator[None]:
        """Two people who submit the same run at once do so one after the other."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open_locked(self.path / "lock", "w", fcntl.LOCK_EX):
            yield
