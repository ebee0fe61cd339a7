"""The quickstart reports what each step took to make what is there, however often it was started."""

import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.quickstart import Step, StepTimes, check_agreement, run_step, tree_memory
from foundation.errors import DataError, UserError


def note(
    times: StepTimes, step: Step, seconds: float, finished: bool = True, writes: str | None = None
) -> None:
    if writes is not None:
        step.product.write_text(writes)
    times.record(step, seconds, peak_bytes=2_000_000_000, finished=finished)


def test_times_are_of_what_is_there(tmp_path: Path) -> None:
    step = Step("pt", "train pt.yaml", tmp_path / "model")
    times = StepTimes(tmp_path / "steps.json")
    note(times, step, 20.0, finished=False)
    note(times, step, 30.0, writes="weights")
    assert StepTimes(tmp_path / "steps.json").steps["pt"]["seconds"] == 50.0
    note(times, step, 1.0)  # found it done
    assert times.steps["pt"]["seconds"] == 50.0 and times.steps["pt"]["peak_memory_gb"] == 2.0
    step.product.unlink()
    note(times, step, 7.0, writes="made again")
    assert times.steps["pt"]["seconds"] == 7.0


def test_a_step_that_fails_says_which_and_keeps_its_code(tmp_path: Path) -> None:
    step = Step("pt", f"train {tmp_path}/nothing.yaml", tmp_path / "model")
    times = StepTimes(tmp_path / "steps.json")
    with pytest.raises(UserError, match="'pt' ended with exit code 78") as error:
        run_step(step, times)
    assert error.value.exit_code == 78
    assert not times.steps["pt"]["finished"] and times.steps["pt"]["seconds"] > 0


def test_memory_is_that_of_this_process_at_least() -> None:
    block = bytearray(50_000_000)
    assert tree_memory() > len(block)


def test_a_command_that_is_saving_is_interrupted_once_and_waited_for() -> None:
    """To a stage that saves, a second Ctrl-C means to end at once and lose what is not saved."""
    program = (
        "import signal, sys, time\n"
        "interrupts = []\n"
        "signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))\n"
        "print('ready', flush=True)\n"
        "while not interrupts: time.sleep(0.02)\n"
        "time.sleep(1.5)\n"
        "sys.exit(len(interrupts))\n"
    )
    # A session of its own has no terminal, so that the signal can only come from `stop`.
    waiter = (
        "import subprocess, sys; from evaluation.quickstart import stop\n"
        f"child = subprocess.Popen([sys.executable, '-c', {program!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); stop(child); sys.exit(child.returncode)\n"
    )
    done = subprocess.run([sys.executable, "-c", waiter], start_new_session=True, check=False, timeout=60)
    assert done.returncode == 1


def test_a_model_that_has_not_memorized_the_photos_is_no_success() -> None:
    check_agreement({"bit_agreement": {"SFT": 0.95, "distilled": 1.0}})
    with pytest.raises(UserError, match=r"distilled: 0\.949 of the bits") as error:
        check_agreement({"bit_agreement": {"SFT": 0.96, "distilled": 0.949}})
    assert "SFT" not in str(error.value)
    with pytest.raises(UserError, match="SFT: nan"):
        check_agreement({"bit_agreement": {"SFT": float("nan")}})


def test_a_damaged_file_of_times_is_named(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"pt": {"sec')
    with pytest.raises(DataError, match=rf"{tmp_path}/steps\.json is damaged .* delete it"):
        StepTimes(tmp_path / "steps.json")
