"""The whole path, small: from real photos to generated pictures by the commands that a user would type.

Every command may be run again and then does what is left, so the quickstart has no state of its own but the
times that it reports.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from foundation.errors import ExitCode, UserError
from foundation.files import atomic_write
from foundation.progress import say

HOME = Path("runs/quickstart")
PROMPT = "A close portrait of a tabby cat with green eyes."
COMMANDS = {
    "sample": f"data sample {HOME}/photos",
    "filter": "data filter configs/quickstart/filter.yaml",
    "tokenizer": "tokenizer train configs/quickstart/tokenizer.yaml",
    "tokenize": "data tokenize configs/quickstart/tokenize.yaml",
    "pt": "train configs/quickstart/pt.yaml",
    "ct": "train configs/quickstart/ct.yaml",
    "sft": "train configs/quickstart/sft.yaml",
    "distill": "train configs/quickstart/distill.yaml",
    "generate": f'generate {HOME}/distill/export --prompt "{PROMPT}" --size 256x256 -o {HOME}/generated',
    "compare": "compare configs/quickstart/compare.yaml",
}
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
        UserError: started outside a checkout, where the recipes aren't.
    """
    if not Path("configs/quickstart").is_dir():
        raise UserError("configs/quickstart is not here: run the quickstart in the root of the repository")
    times = StepTimes(HOME / "steps.json")
    for number, (name, arguments) in enumerate(COMMANDS.items(), start=1):
        say(f"\n[{number}/{len(COMMANDS)}] $ bitdance {arguments}")
        times.record(name, arguments, *run_step(name, arguments))
    report = write_report(times)
    say("")
    for line in summary(report):
        say(line)


def run_step(name: str, arguments: str) -> tuple[float, int]:
    """Run one command; returns its seconds and its peak memory in bytes, all its processes together."""
    # -P: modules come from the installed package, not from whatever lies in the current directory.
    command = [sys.executable, "-P", "-m", "bitdance", *shlex.split(arguments)]
    started = time.monotonic()
    process = subprocess.Popen(command)
    memory = PeakMemory(process.pid)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # A terminal's Ctrl-C has reached the command too; it is given the time to save.
        stop(process)
        raise
    finally:
        peak = memory.stop()
    if code in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    if code != ExitCode.DONE:
        raise StepFailed(name, code)
    return time.monotonic() - started, peak


def stop(process: subprocess.Popen[bytes]) -> None:
    """Wait for an interrupted command; interrupt it ourselves where nobody has, kill it where it hangs."""
    for patience in (1.0, INTERRUPT_GRACE):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    process.kill()


class PeakMemory:
    """Samples the resident memory of a process and its children, twice a second."""

    def __init__(self, pid: int):
        self.pid, self.peak, self._stopped = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            self.peak = max(self.peak, tree_memory(self.pid))

    def stop(self) -> int:
        """End the sampling; returns the peak in bytes."""
        self._stopped.set()
        self._thread.join()
        return self.peak


def tree_memory(pid: int) -> int:
    """Resident bytes of the process and all that it has started; 0 where it is gone."""
    try:
        root = psutil.Process(pid)
        return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])
    except psutil.Error:  # a process that ends while we look
        return 0


class StepTimes:
    """`steps.json`: how long each step took when it really worked; finding it done again adds nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def record(self, name: str, arguments: str, seconds: float, peak_bytes: int) -> None:
        """Note a finished step, unless it had been finished before."""
        if name in self.steps:
            return
        self.steps[name] = {
            "command": f"bitdance {arguments}",
            "seconds": round(seconds, 1),
            "peak_memory_gb": round(peak_bytes / 1e9, 2),
        }
        with atomic_write(self.path) as file:
            json.dump(self.steps, file, indent=1)


def write_report(times: StepTimes) -> dict[str, Any]:
    """Join the times with the comparison's figures into `report.json`; returns what was written."""
    comparison = json.loads((HOME / "compare" / "comparison.json").read_text())
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
    lines.append(
        f"  reconstruction PSNR {report['psnr_mean']:.1f} dB (mean of {len(report['samples'])} photos)"
    )
    for label, agreement in report["bit_agreement"].items():
        lines.append(f"  bits that equal the photo's, {label}: {agreement:.3f}")
    return [*lines, f"Look at {HOME}/grid.png; the figures are in {HOME}/report.json"]
