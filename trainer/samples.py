"""Pictures of fixed prompts while a run goes on, made beside it from what it has saved.

Rank 0 starts a process of its own for them (`sample_process.py`), which reads the last committed checkpoint
from disk, makes an exported copy and samples that: no rank computes anything for it, and nothing that happens
to it can stop training. There is at most one at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from foundation.progress import say
from trainer.metrics import EventLog
from trainer.recipe import SamplesSection
from trainer.run_folder import RunFolder

LOG = "samples.log"
LAST_PATIENCE_SECONDS = 600.0  # for the pictures of the last checkpoint, once training is done
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SideSampler:
    """Starts and follows the side process, on rank 0.

    Pictures are due at the first checkpoint at or after each multiple of `samples.every_steps`.
    """

    def __init__(self, run: RunFolder, section: SamplesSection, events: EventLog):
        self._run, self._section, self._events = run, section, events
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0
        for left in run.samples.glob("*.partial"):  # of a start that was killed
            shutil.rmtree(left, ignore_errors=True)
        done = (path.name.removeprefix("step-") for path in run.samples.glob("step-*"))
        self._last = max((int(step) for step in done if step.isdecimal()), default=0)

    def look(self, committed_step: int) -> None:
        """See to a process that has ended, and start one where pictures of the newest checkpoint are due."""
        self._collect()
        every = self._section.every_steps
        if self._process is None and committed_step // every > self._last // every:
            self._start(committed_step)

    def finish(self, committed_step: int) -> None:
        """Let the last pictures be made, where they are due, but not for longer than is reasonable."""
        deadline = time.monotonic() + LAST_PATIENCE_SECONDS
        self.look(committed_step)
        while self._process is not None and time.monotonic() < deadline:
            time.sleep(0.1)
            self.look(committed_step)
        self.close()

    def close(self) -> None:
        """End a process that is still at work."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._clear()

    def _start(self, step: int) -> None:
        self._step = self._last = step
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        command = [sys.executable, "-m", "trainer.sample_process", str(self._run.path), str(step)]
        try:
            self._run.samples.mkdir(exist_ok=True)
            with open(self._run.logs / LOG, "ab") as log:
                self._process = subprocess.Popen(
                    [*command, str(os.getpid())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            self._failed(str(error))

    def _collect(self) -> None:
        code = None if self._process is None else self._process.poll()
        if code is None:
            return
        if code == 0:
            self._publish()
        else:
            self._failed(f"its process ended with {code}")
        self._clear()

    def _publish(self) -> None:
        try:
            partial_pictures(self._run, self._step).rename(self._run.samples / f"step-{self._step}")
        except OSError as error:
            self._failed(str(error))
        else:
            self._events.write("sampled", step=self._step)

    def _failed(self, problem: str) -> None:
        self._events.write("sampling_failed", step=self._step, problem=problem)
        say(f"No pictures of step {self._step}: {problem}; see {self._run.logs / LOG}. Training goes on.")

    def _clear(self) -> None:
        self._process = None
        for partial in (partial_pictures(self._run, self._step), exported_copy(self._run, self._step)):
            shutil.rmtree(partial, ignore_errors=True)


def partial_pictures(run: RunFolder, step: int) -> Path:
    """Where the pictures of a step are put before all are there."""
    return run.samples / f"step-{step}.partial"


def exported_copy(run: RunFolder, step: int) -> Path:
    """Where the model of a step stands for as long as it is sampled."""
    return run.samples / f"model-{step}.partial"
