"""What a person sees of a rank, whose output otherwise goes to its log. Imports no torch."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast


class Terminal:
    """The terminal that this process was started on, once all output has been sent to a log.

    Args:
        log: file that all output of this process, its libraries' too, is appended to from now on.
        echo: what Python prints goes to the terminal as well.
    """

    def __init__(self, log: Path, echo: bool):
        sys.stdout.flush()
        sys.stderr.flush()
        self._out: Any = _Forgiving(os.fdopen(os.dup(1), "w", buffering=1), self._lost)
        self._errors: Any = _Forgiving(os.fdopen(os.dup(2), "w", buffering=1), self._lost)
        self._echo, self._told_lost = echo, False
        self._bar: StepBar | None = None
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        faulthandler.enable()
        # A full disk ends no training: what the log does not take its buffer keeps, and tries again.
        log_out: Any = _Forgiving(sys.stdout)
        sys.stdout = _Tee(log_out, self) if echo else log_out
        sys.stderr = cast(Any, _Forgiving(sys.stderr))

    def write(self, text: str) -> None:
        """Show ``text``; above the bar, where there is one."""
        (self._bar or self._out).write(text)

    def flush(self) -> None:
        self._out.flush()

    def complain(self, message: str) -> None:
        """Say on standard error what has gone wrong."""
        self.end_steps()
        print(f"error: {message}", file=self._errors, flush=True)

    def show_step(self, done: int, of: int, note: str) -> None:
        """Move the bar; there is one on a terminal, from the first call to `end_steps`."""
        if self._bar is None and self._echo and self._out.isatty():
            self._bar = StepBar(self._out, done, of)
        if self._bar is not None:
            self._bar.show(done, note)

    def end_steps(self) -> None:
        """Take the bar away."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def _lost(self, error: OSError) -> None:
        if not self._told_lost:
            self._told_lost = True
            print(
                f"The terminal takes no more ({error}): this log has everything", file=sys.stderr, flush=True
            )


class StepBar:
    """Steps done, rich's bar, time left; what is printed meanwhile scrolls by above it."""

    def __init__(self, terminal: IO[str], done: int, steps: int):
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=terminal)
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        # Redirected here, and not by rich, which would keep what is printed from the log.
        self._progress = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
        self._above = FileProxy(console, terminal)
        self._task = self._progress.add_task("", completed=done, total=steps)
        self._progress.start()

    def write(self, text: str) -> None:
        self._above.write(text)

    def show(self, done: int, note: str) -> None:
        self._progress.update(self._task, completed=done, description=note)

    def close(self) -> None:
        self._above.flush()
        self._progress.stop()


class _Forgiving:
    """A stream whose end may be closed, or on a full disk: that ends no training."""

    def __init__(self, stream: IO[str], lost: Callable[[OSError], None] = lambda error: None):
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self._lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Tee:
    """Writes to a log and a terminal; to everything else it is the log."""

    def __init__(self, log: IO[str], terminal: Terminal):
        self._log, self._terminal = log, terminal

    def write(self, text: str) -> int:
        self._log.write(text)  # first: what the terminal says to it goes to the log too
        self._terminal.write(text)
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)
