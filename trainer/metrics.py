"""What a run tells: `metrics.jsonl` (a line per step), `events.jsonl` (what happened), W&B as the recipe
says.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from foundation.files import atomic_write
from foundation.progress import say
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder, first_started, starts_of

WANDB_PROBE_SECONDS = 5.0


class EventLog:
    """Appends what happens to a run to `events.jsonl`: {"time", "start", "event", ...}; a rank but 0 writes
    nothing.
    """

    def __init__(self, run: RunFolder, start: int, writes: bool):
        self._start = start
        self._file = open(run.events, "a", buffering=1) if writes else None  # noqa: SIM115

    def write(self, event: str, **details: Any) -> None:
        """One line, at once on its way to disk."""
        if self._file is not None:
            line = {"time": time.time(), "start": self._start, "event": event, **details}
            with suppress(OSError):  # a full disk ends no training: the buffer keeps the line for later
                self._file.write(json.dumps(line) + "\n")


class MetricsLog:
    """A line per step in `metrics.jsonl`, and the same to W&B; of all ranks only rank 0 has one."""

    def __init__(self, run: RunFolder, recipe: StageRecipe, from_step: int):
        """Go on at ``from_step``: see `go_back_to`."""
        self._path = run.metrics
        self.go_back_to(from_step)
        self._wandb = _start_wandb(run, recipe)

    def go_back_to(self, step: int) -> None:
        """Steps from ``step`` on will be done (again): what the file says of them is dropped.

        The file is replaced and not cut, so that a stale process that still has it open writes into the void.
        """
        kept = [line for line in read_metrics(self._path) if line["step"] < step]
        try:
            with atomic_write(self._path) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        except OSError as error:
            say(f"{self._path} still has steps from {step} on, which are done again: {error}")
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115

    def write(self, metrics: dict[str, Any]) -> None:
        """One step's metrics; "step" is among them."""
        with suppress(OSError):  # as above
            self._file.write(json.dumps(metrics) + "\n")
        self._tell_wandb(lambda wandb: wandb.log(metrics))

    def close(self) -> None:
        with suppress(OSError):  # what could not be written is tried once more
            self._file.close()
        self._tell_wandb(lambda wandb: wandb.finish())

    def _tell_wandb(self, tell: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:  # noqa: BLE001  (its own process may be gone, in many ways: no reason to end)
            self._wandb = None
            say(f"W&B is gone ({error!r}): the run goes on without it; all is in {self._path}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that are whole (a kill can cut the last one short); none where there is no
    file.
    """
    lines = []
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Those lines of a `metrics.jsonl` that are whole and of a step."""
    return [line for line in read_lines(path) if type(line.get("step")) is int]


def first_trained(run: RunFolder) -> float:
    """When the first start began that came as far as to train, in seconds since 1970; before there is one,
    when the latest start did.
    """
    trained = {line.get("start") for line in read_lines(run.events) if line.get("event") == "started"}
    times = [(number, start["time"]) for number, start in enumerate(starts_of(run), start=1) if start]
    return float(next((began for number, began in times if number in trained), times[-1][1]))


def _start_wandb(run: RunFolder, recipe: StageRecipe) -> Any:
    if recipe.metrics.wandb == "disabled":
        return None
    import wandb

    def begin(mode: Literal["offline", "online"]) -> Any:
        started = wandb.init(
            project=recipe.metrics.project,
            name=run.path.name,
            id=run.path.resolve().name + "-" + recipe_identity(run),
            dir=str(run.path),
            mode=mode,
            resume="allow",
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
        # Of W&B's own steps, which may only rise, a run that goes back would lose those that it does again.
        started.define_metric("*", step_metric="step")
        return started

    if recipe.metrics.wandb == "online":
        try:
            if _wandb_reachable():
                return begin("online")
            reason = "cannot be reached"
        except Exception as error:  # noqa: BLE001  (no login, a key that is not accepted, a disk that is full, ...)
            reason = f"cannot be used ({error})"
        say(f"W&B {reason}: its metrics are kept offline (`wandb sync` sends them later)")
    try:
        return begin("offline")
    except Exception as error:  # noqa: BLE001  (as in `MetricsLog._tell_wandb`)
        say(f"W&B does not start ({error!r}): the run goes on without it; all is in {run.metrics}")
        return None


def recipe_identity(run: RunFolder) -> str:
    """A short name of the run that stays the same over its restarts: when it was first started."""
    return f"{first_started(run):.0f}"


def _wandb_reachable() -> bool:
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=WANDB_PROBE_SECONDS).close()
    except OSError:
        return False
    return True
