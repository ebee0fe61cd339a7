"""The whole path, small: from real photos to generated pictures by the commands that a user would type.

Every command may be run again and then does what is left, so the quickstart has no state of its own but the
times that it reports.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from evaluation.compare import MEND as COMPARE_AGAIN
from foundation.errors import ExitCode, UserError
from foundation.files import atomic_write
from foundation.json_files import read_json
from foundation.progress import say

HOME = Path("runs/quickstart")
PROMPT = "The orange back of an eye with branching blood vessels."


class Step(NamedTuple):
    """A command of the path. What it writes last, and writes again only when it really works, tells whether
    it had anything to do."""

    name: str
    arguments: str
    product: Path


def _stage(name: str) -> Step:
    return Step(name, f"train configs/quickstart/{name}.yaml", HOME / name / "export" / "model.safetensors")


STEPS = (
    Step("sample", f"data sample {HOME}/photos", HOME / "photos" / "metadata.parquet"),
    Step("filter", "data filter configs/quickstart/filter.yaml", HOME / "kept" / "kept.parquet"),
    Step(
        "tokenizer",
        "tokenizer train configs/quickstart/tokenizer.yaml",
        HOME / "tokenizer" / "ae.safetensors",
    ),
    Step("tokenize", "data tokenize configs/quickstart/tokenize.yaml", HOME / "latents" / "manifest.json"),
    *map(_stage, ("pt", "ct", "sft", "distill")),
    Step(
        "generate",
        f'generate {HOME}/distill/export --prompt "{PROMPT}" --size 256x256 --guidance 1.5 --steps 10 '
        f"-o {HOME}/generated",
        HOME / "generated",
    ),
    Step("compare", "compare configs/quickstart/compare.yaml", HOME / "compare" / "comparison.json"),
)
LEAST_AGREEMENT = 0.95  # of generated bits with the photos'
INTERRUPT_GRACE = 60.0  # seconds that an interrupted command has for saving


class StepFailed(UserError):
    """A command ended badly; it has said why itself."""

    def __init__(self, name: str, code: int):
        super().__init__(f"the step {name!r} ended with exit code {code}; mend it and start again")
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.BUG


def run_quickstart() -> None:
    """Run all commands in order, printing each, then write `report.json` and say what came out.

    Raises:
        StepFailed: a command failed; those before it need not be run again.
        UserError: started outside a checkout, where the recipes aren't; or the model has not memorized the
            photos.
    """
    if not Path("configs/quickstart").is_dir():
        raise UserError("configs/quickstart is not here: run the quickstart in the root of the repository")
    times = StepTimes(HOME / "steps.json")
    for number, step in enumerate(STEPS, start=1):
        say(f"\n[{number}/{len(STEPS)}] $ bitdance {step.arguments}")
        run_step(step, times)
    report = write_report(times)
    say("")
    for line in summary(report):
        say(line)
    check_agreement(report)


def check_agreement(report: dict[str, Any]) -> None:
    """The verdict: a model that has seen only these photos must have memorized them.

    Raises:
        UserError: it has not, so order, positions, masks, hand-off or sampling do not fit together.
    """
    low = {label: share for label, share in report["bit_agreement"].items() if not share >= LEAST_AGREEMENT}
    if low:
        found = ", ".join(f"{label}: {share:.3f}" for label, share in low.items())
        raise UserError(
            f"{found} of the bits equal the photos', expected at least {LEAST_AGREEMENT} (0.5 is chance): if "
            "the recipes in configs/quickstart are as they came, some part of the path is broken"
        )


def run_step(step: Step, times: StepTimes) -> None:
    """Run one command and note what it took, also where it is interrupted or fails."""
    started, memory, finished = time.monotonic(), PeakMemory(), False
    try:
        run_command(step)
        finished = True
    finally:
        times.record(step, time.monotonic() - started, memory.stop(), finished)


def run_command(step: Step) -> None:
    """Run one command in a process of its own. Raises KeyboardInterrupt or StepFailed as it ended."""
    # -P: modules come from the installed package, not from whatever lies in the current directory.
    command = [sys.executable, "-P", "-m", "bitdance", *shlex.split(step.arguments)]
    # Ctrl-C is held back here until the command can be waited for, and in the command (which inherits that)
    # until it has come as far as to answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = subprocess.Popen(command)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        code = process.wait()
    except KeyboardInterrupt:
        stop(process)
        raise
    if code in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    if code != ExitCode.DONE:
        raise StepFailed(step.name, code)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Give an interrupted command the time to save; kill it where it hangs.

    It is interrupted once and not twice: to a stage that is saving, a second Ctrl-C means "at once".
    """
    if not of_the_terminal():
        process.send_signal(signal.SIGINT)
    try:
        process.wait(INTERRUPT_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def of_the_terminal() -> bool:
    """Whether Ctrl-C on the terminal reaches this process, and so all that it has started."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # no terminal
        return False


class PeakMemory:
    """Samples the resident memory of this process and all that it has started, twice a second."""

    def __init__(self) -> None:
        self.peak, self._stopped = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            self.peak = max(self.peak, tree_memory())

    def stop(self) -> int:
        """End the sampling; returns the peak in bytes."""
        self._stopped.set()
        self._thread.join()
        return self.peak


def tree_memory() -> int:
    """Resident bytes of this process and all that it has started; 0 where one of them is just gone."""
    try:
        this = psutil.Process()
        return sum(process.memory_info().rss for process in [this, *this.children(recursive=True)])
    except psutil.Error:  # a process that ends while we look
        return 0


class StepTimes:
    """`steps.json`: what each step took to make what is there now, interrupted attempts included."""

    def __init__(self, path: Path):
        self.path = path
        mend = "delete it; the quickstart goes on, and only the times of what is done are lost"
        self.steps: dict[str, dict[str, Any]] = read_json(path, mend) if path.exists() else {}

    def record(self, step: Step, seconds: float, peak_bytes: int, finished: bool) -> None:
        """Note an attempt, unless it has found everything done."""
        entry = self.steps.get(step.name, {})
        written = step.product.stat().st_mtime_ns if step.product.exists() else None
        if finished and entry.get("written") == written:
            return
        earlier = {} if entry.get("finished") else entry
        self.steps[step.name] = {
            "command": f"bitdance {step.arguments}",
            "seconds": round(earlier.get("seconds", 0.0) + seconds, 1),
            "peak_memory_gb": round(max(earlier.get("peak_memory_gb", 0.0), peak_bytes / 1e9), 2),
            "finished": finished,
            "written": written,
        }
        with atomic_write(self.path) as file:
            json.dump(self.steps, file, indent=1)


def write_report(times: StepTimes) -> dict[str, Any]:
    """Join the times with the comparison's figures into `report.json`; returns what was written."""
    figures = ("samples", "psnr_mean", "bit_agreement")
    comparison = read_json(HOME / "compare" / "comparison.json", COMPARE_AGAIN, *figures)
    report = {
        "wall_seconds": {name: step["seconds"] for name, step in times.steps.items()},
        "total_seconds": round(sum(step["seconds"] for step in times.steps.values()), 1),
        "peak_memory_gb": max(step["peak_memory_gb"] for step in times.steps.values()),
        **comparison,
    }
    with atomic_write(HOME / "report.json") as file:
        json.dump(report, file, indent=1)
    with atomic_write(HOME / "grid.png", "wb") as file:
        file.write((HOME / "compare" / "grid.png").read_bytes())
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """What a person wants to know at the end, in a few lines."""
    lines = [f"The whole path took {report['total_seconds']:.0f} s and {report['peak_memory_gb']} GB:"]
    lines += [f"  {name:<10} {seconds:>6.1f} s" for name, seconds in report["wall_seconds"].items()]
    photos, lowest = len(report["samples"]), min(sample["psnr"] for sample in report["samples"])
    distance = f"{report['psnr_mean']:.1f} dB (mean of {photos} photos; lowest {lowest:.1f} dB)"
    lines.append(f"  reconstruction PSNR {distance}")
    for label, agreement in report["bit_agreement"].items():
        lines.append(f"  bits that equal the photo's, {label}: {agreement:.3f}")
    return [*lines, f"Look at {HOME}/grid.png; the figures are in {HOME}/report.json"]
