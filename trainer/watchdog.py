"""Ends a job whose step hangs, with the stacks of all threads in every rank's log."""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from foundation.errors import ExitCode
from trainer.recipe import WatchdogSection

REMEMBERED_STEPS = 32
UNHURRIED_SECONDS = 1800.0  # for the first step, which compiles and fills caches, and for what is no step
LEAVE_SECONDS = 60.0  # for closing what connects the ranks, once all that matters is done


class Watchdog:
    """A thread that waits for the next sign of life.

    A hung collective cannot be left any other way than by ending the process, so that is what it does: exit
    code 75, which has the scheduler start the run again from its last checkpoint.
    """

    def __init__(self, section: WatchdogSection, bark: Callable[[float], None] | None = None):
        """
        Args:
            bark: what to do with a silence of so many seconds, in place of `end_process`.
        """
        self._section = section
        self._bark = bark or end_process
        self._steps: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch; what happened before does not count."""
        self._last = time.monotonic()
        self._thread.start()

    def step_done(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step and may take its time."""
        self._last = math.inf
        try:
            yield
        finally:
            self._last = time.monotonic()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def patience(self) -> float:
        """Seconds that the present step may take."""
        usual = self._section.factor * statistics.median(self._steps) if self._steps else UNHURRIED_SECONDS
        return max(self._section.at_least_minutes * 60, usual)

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self.patience() / 10)):
            silence = time.monotonic() - self._last
            if silence > self.patience():
                self._bark(silence)
                return


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """End the process, with all stacks in the rank's log, where the block takes more than so many seconds."""
    timer = threading.Timer(seconds, end_process, (seconds, "The connections of the ranks have not closed"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_process(silence: float, what: str = "No step has ended") -> None:
    """Write all stacks to the rank's log and end with exit code 75."""
    print(f"{what} for {silence:.0f} s. The stacks of all threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    # Not sys.exit: the main thread hangs in a collective and would never see it.
    os._exit(ExitCode.REQUEUE)
