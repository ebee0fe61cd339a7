"""Whole runs of `bitdance` in real processes, and what they leave behind."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint_files import committed
from trainer.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
# What a step computes; the rest of a line depends on the clock.
COMPUTED = (
    "step",
    "loss",
    "vision_loss",
    "vision_loss_128",
    "vision_loss_256",
    "text_loss",
    "grad_norm",
    "lr",
)


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bitdance", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def bitdance(*arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments)
    output, _ = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def metrics(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def computed(run: Path) -> list[tuple]:
    return [tuple(line.get(key) for key in COMPUTED) for line in metrics(run)]


def weights(run: Path) -> dict[str, str]:
    files = json.loads((run / "export" / "export.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def events(run: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not happened() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_at_random(recipe: Path, run: Path, kills: int) -> None:
    """Start a run and kill it, again and again, then let it finish; every third kill falls into a save.

    A kill that comes too late for its save does not count. Of three starts from the same checkpoint the third
    is let commit one before it is killed: after three that did not, the same command would rightly refuse a
    fourth. Asserts that a start loses no step but those since the last commit.
    """
    chance, counted, inside_saves, begun_at = random.Random(0), 0, 0, [-1, -1]

    def partials() -> set[Path]:
        return set((run / "checkpoints").glob("*.partial-*"))

    def newest_commit() -> int:
        return max((step for step, _ in committed(RunFolder(run))), default=0)

    while counted < kills:
        old, into_save = partials(), counted % 3 == 0  # what the kill before has left, this start removes
        until = len(metrics(run)) + chance.randint(1, 3)
        begun_at.append(newest_commit())
        process = start("train", str(recipe))
        if len(set(begun_at[-3:])) == 1:
            wait_until(lambda: newest_commit() > begun_at[-1], process)
            old |= partials()
        if into_save:
            wait_until(lambda old=old: bool(partials() - old), process)  # type: ignore[misc]
        else:
            wait_until(lambda until=until: len(metrics(run)) >= until, process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.1))  # anywhere in a step
        assert process.poll() is None, "the run was over before it could be killed"
        process.kill()  # its ranks go with it
        process.communicate()
        inside = bool(partials() - old)
        inside_saves += inside
        counted += inside or not into_save
    assert inside_saves >= (kills + 2) // 3
    done = bitdance("train", str(recipe))
    assert done.returncode == 0, done.stdout
    newest = 0
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "started":
            assert event["step"] >= newest
        elif event["event"] == "saved":
            newest = event["step"]
